"""What a notebook shows of episodes and selections: text stays text."""
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from exprag.select import Selection
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Experience, Hit


class Seen(HTMLParser):
    """The tags, attributes and text of some HTML."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data): self.text.append(data)
    def handle_comment(self, data): self.tags.add("!comment")
    def handle_decl(self, data): self.tags.add("!declaration")


ATTACKS = ["<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>",
           '" onmouseover="x', "<!-- ", "]]>", "&lt;b&gt;", "$x$"]
text = st.one_of(st.text(max_size=30), st.sampled_from(ATTACKS))


@given(text, text, text)
def test_text_stays_text(goal, action, observation):
    shown = Trajectory(Task("w", "<b>t", "1", "train"), goal, observation, (Step(action, observation),),
                       1.0, True)
    found = Experience(shown, Hit("<i>" + "0" * 29, 0.5, 1), note=action)
    for thing in (shown, Selection((found,)), Selection((found,)).explain()):
        seen = Seen(thing._repr_html_())
        assert seen.tags <= {"table", "thead", "tbody", "caption", "tr", "th", "td"}
        assert seen.attributes <= {"class"}
    def lines(text): return text.replace("\r\n", "\n").replace("\r", "\n")
    whole = lines("".join(Seen(shown._repr_html_()).text))
    for said in (goal, action, observation):  # HTML has no place for some characters
        assert lines(said) in whole or "\0" in said
