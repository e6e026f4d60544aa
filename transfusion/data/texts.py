"""Plain text: Python's own manual, and a user's .txt and .jsonl files; texts that fit in memory."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from transfusion.data.sources import SampleError, Skipped, Split, TextSource, held_out, is_unicode, warn_skipped


class PydocTextSource(TextSource):
    """The language reference that ships with CPython (`pydoc_data.topics`), one document per topic.

    Topics quote each other at length (a quarter of the text), so a paragraph is kept once, in a held-out topic
    first: no paragraph of the test split occurs in the train split.
    """

    def __init__(self, split: Split = "train", test_fraction: float = 0.1) -> None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError(f"this Python has no pydoc_data ({error}): use TextFolderSource") from error
        super().__init__(_paragraphs_once(topics, held_out(topics, test_fraction)), split, test_fraction)


def _paragraphs_once(topics: dict[str, str], first: set[str]) -> dict[str, str]:
    seen: set[str] = set()
    unique = {}
    for name in sorted(topics, key=lambda name: (name not in first, name)):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= 40:  # short ones, such as "See also:", may come again
                seen.add(words)
        if kept:
            unique[name] = "\n\n".join(kept)
    return unique


class TextFolderSource(TextSource):
    """Every *.txt and *.jsonl file under a folder, or one such file, UTF-8.

    A .txt file is a document, named by its path; each line {"text": "..."} of a .jsonl file is one, named by file and
    line. `captions.jsonl`, which lists images, is left out; linked folders are followed. What is held out is told by
    what a text says, so that lines may come and go, and one that is there twice is on one side. What is blank,
    malformed or cannot be read is warned about and kept with its reason in `skipped`. Raises `ValueError` where no text
    is left.
    """

    def __init__(self, path: str | Path, split: Split = "train", test_fraction: float = 0.1) -> None:
        place = Path(path)
        texts: dict[str, str] = {}
        skipped: list[Skipped] = []
        for name, text in _texts(place):
            if isinstance(text, SampleError):
                skipped.append((text.name, text.reason))
                warn_skipped(place, text.name, text.reason)
            else:
                texts[name] = text
        if not texts:
            raise ValueError(
                f"{place} has no readable text: expected UTF-8 *.txt files, or *.jsonl files with one "
                f'{{"text": "..."}} per line ({len(skipped)} skipped); where there are none, give no texts '
                "(--data.texts none)"
            )
        super().__init__(texts, split, test_fraction, skipped, keys=texts)


def parse_text(line: bytes, name: str, field: str = "text") -> str | SampleError:
    """The text of one JSON line {"text": "..."}, or why there is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError(name, f"malformed JSON ({error})")
    text = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        return SampleError(name, f'expected {{"{field}": "non-empty text"}}')
    if not is_unicode(text):
        return SampleError(name, "no valid Unicode: half of a surrogate pair is in it")
    return text


def _texts(place: Path) -> Iterator[tuple[str, str | SampleError]]:
    for file in [place] if place.is_file() else sorted(_files(place)):
        name = file.name if place.is_file() else file.relative_to(place).as_posix()
        if file.suffix.lower() == ".txt":
            yield name, _read_txt(file, name)
        elif file.suffix.lower() == ".jsonl" and file.name != "captions.jsonl":
            try:
                content = file.read_bytes()
            except OSError as error:
                yield name, SampleError(name, f"unreadable text ({error})")
                continue
            for number, line in enumerate(content.splitlines(), start=1):
                if line.strip():
                    yield f"{name}:{number}", parse_text(line, f"{name}:{number}")


def _files(place: Path) -> Iterator[Path]:
    """Every file under `place`, in linked folders too; each folder once."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


def _read_txt(file: Path, name: str) -> str | SampleError:
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        return SampleError(name, f"unreadable text ({error})")
    return text if text.strip() else SampleError(name, "the file is blank")
