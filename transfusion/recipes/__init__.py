"""Configs of runs that come with the package, by name, and the weights that some of them have led to.

emoji-32.toml   a recipe                            transfusion train --config emoji-32
emoji-32/       the saved pipeline that it led to   transfusion sample --model emoji-32
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of every recipe, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def trained() -> dict[str, Path]:
    """Name -> folder of each saved pipeline that comes with the package."""
    return {path.parent.name: path.parent for path in sorted(_FOLDER.glob("*/pipeline.toml"))}


def find(config: str | Path) -> Path:
    """The file `config`, or else the recipe of that name. Raises `FileNotFoundError` where there is neither."""
    if Path(config).is_file():
        return Path(config)
    if str(config) in names():
        return _FOLDER / f"{config}.toml"
    raise FileNotFoundError(f"{config} is no file and no recipe; the recipes are {', '.join(names())}")
