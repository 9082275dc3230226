"""A page of pictures with right and wrong answers, in one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    """A picture, what it shows, and what the model said."""

    file: Path
    caption: str
    answer: str

    @property
    def right(self) -> bool:
        """Whether it said exactly that."""
        return self.answer.strip() == self.caption


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Held-out pictures</title>
<style>
body {{ font: 14px sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
section {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9em, 1fr)); gap: 1em }}
figure {{ margin: 0; padding: .5em; border: 1px solid #ccc; text-align: center }}
.wrong {{ border-color: #c33 }}
.wrong del {{ color: #c33 }}
</style>
<h1>{right} of {count} held-out pictures named rightly</h1>
<h2>Wrong</h2><section>{wrong_figures}</section>
<h2>Right</h2><section>{right_figures}</section>
</html>
"""


def write_gallery(answers: Sequence[Answer], page: Path) -> None:
    """Writes the page, wrong answers first, each with what was right."""
    right = [answer for answer in answers if answer.right]
    wrong = [answer for answer in answers if not answer.right]
    text = _PAGE.format(
        right=len(right),
        count=len(answers),
        wrong_figures="".join(map(_figure, wrong)),
        right_figures="".join(map(_figure, right)),
    )
    page.write_text(text, encoding="utf-8")


def _figure(answer: Answer) -> str:
    data = base64.b64encode(answer.file.read_bytes()).decode()
    kind = {".jpg": "jpeg"}.get(answer.file.suffix, answer.file.suffix.removeprefix("."))
    caption, said = html.escape(answer.caption), html.escape(answer.answer.strip() or "(nothing)")
    told = caption if answer.right else f"<del>{said}</del><br>{caption}"
    mark = "right" if answer.right else "wrong"
    return (
        f'<figure class="{mark}"><img src="data:image/{kind};base64,{data}" alt="{caption}" '
        f'width="72"><figcaption>{told}</figcaption></figure>\n'
    )
