"""One page with everything that a call drew and wrote: HTML that needs no other file."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfusion.files import write_whole

if TYPE_CHECKING:
    from PIL import Image

_SMALL = 256  # pixels; a smaller picture is shown larger, its pixels as squares

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; font-weight: 600; margin: 0 0 1.2rem; }}
main {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }}
article {{ width: 11rem; border: 1px solid #8886; border-radius: .6rem; overflow: hidden; }}
article.wide {{ width: 23.1rem; max-width: 100%; }}
article > div {{ padding: .7rem .8rem; }}
img {{ display: block; width: 100%; height: auto; }}
.wide > img {{ max-width: 11rem; margin: 0 .8rem; }}
img.small {{ image-rendering: pixelated; }}
.given img {{ width: 6rem; border-radius: .3rem; }}
.label {{ font-size: .75rem; opacity: .65; }}
p {{ margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
details {{ margin-top: 1.5rem; }}
pre {{ overflow-x: auto; font-size: .8rem; }}
</style>
<h1>{title}</h1>
<main>
{cards}
</main>
<details><summary>settings</summary><pre>{settings}</pre></details>
</html>
"""


@dataclass(frozen=True)
class Card:
    """One row of a call: what it was given, and what came of it, strings and pictures in turn."""

    prompt: str
    given: Sequence["Image.Image"]
    result: Sequence["str | Image.Image"]
    label: str = ""


def write_sheet(path: Path, title: str, cards: Sequence[Card], settings: dict[str, Any]) -> None:
    """Writes the page, pictures and all."""
    shown = json.dumps(settings, indent=2, ensure_ascii=False)
    page = _PAGE.format(title=html.escape(title), cards="\n".join(map(_card, cards)), settings=html.escape(shown))
    write_whole(path, page)


def _card(card: Card) -> str:
    parts = [_picture(part) if not isinstance(part, str) else _paragraph(part) for part in card.result]
    given = "".join(_picture(picture) for picture in card.given)
    head = f'<div class="label">{html.escape(card.label)}</div>' if card.label else ""
    about = f"<div>{head}{f'<div class=given>{given}</div>' if given else ''}<p>{html.escape(card.prompt)}</p></div>"
    wide = ' class="wide"' if len(parts) > 1 else ""
    first_is_picture = bool(card.result) and not isinstance(card.result[0], str)
    body = [*parts, about] if first_is_picture and len(parts) == 1 else [about, *parts]
    return f"<article{wide}>{''.join(body)}</article>"


def _paragraph(text: str) -> str:
    return f"<div><p>{html.escape(text)}</p></div>"


def _picture(picture: "Image.Image") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    small = ' class="small"' if max(picture.size) < _SMALL else ""
    return f'<img{small} width="{picture.width}" height="{picture.height}" alt="" src="data:image/png;base64,{data}">'
