"""Encoders for tests that are not about encoders: real ones, if simple, that keep torch from being loaded."""
import zlib

import numpy as np


class WordEncoder:
    "Counts of hashed words."
    name, dim, max_tokens = "words-64", 64, 10 ** 6

    def encode(self, texts, role="document"):
        rows = np.zeros((len(texts), self.dim), "float32")
        for row, text in zip(rows, texts):
            for word in text.lower().split(): row[zlib.crc32(word.encode()) % self.dim] += 1
        return rows / np.maximum(1e-9, np.linalg.norm(rows, axis=1, keepdims=True))


class Letters:
    "Counts of letters."
    name, dim, max_tokens = "letters@1", 26, 10 ** 6

    def encode(self, texts, role="document"):
        rows = np.array([[t.lower().count(chr(97 + c)) for c in range(26)] for t in texts], np.float32).reshape(len(texts), 26) + 0.01
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
