"""Configs of runs that come with the package, by name: `transfusion train --config emoji`."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of every recipe, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find(config: str | Path) -> Path:
    """The file `config`, or else the recipe of that name. Raises `FileNotFoundError` where there is neither."""
    if Path(config).is_file():
        return Path(config)
    if str(config) in names():
        return _FOLDER / f"{config}.toml"
    raise FileNotFoundError(f"{config} is no file and no recipe; the recipes are {', '.join(names())}")
