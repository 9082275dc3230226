"""OpenMoji's pictures and names, from its npm package to a folder that `train.data.pictures` reads.

    npm pack openmoji@17.0.0
    python -m train.data.openmoji openmoji-17.0.0.tgz data/openmoji

All emojis by OpenMoji, https://openmoji.org, licence CC BY-SA 4.0: so is what is made of them here.
The package holds SVG files, which `resvg_py` draws; colours of skin make most of the variants.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path

import resvg_py

from train.data.pictures import CAPTIONS

_LICENCE = (
    "All emojis by OpenMoji - the open-source emoji and icon project. https://openmoji.org\n"
    "License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/\n"
    "Drawn as PNG files on white, {side} x {side} pixels, from the npm package {package}.\n"
)


def make_pictures(package: Path, out: Path, side: int) -> int:
    """Draws every emoji of the package; their number.

    Args:
      package: The .tgz of `npm pack openmoji`.
      out: A folder, new or not.
      side: Of the pictures in pixels.

    Raises:
      KeyError, OSError, tarfile.TarError: the package is not what it should be.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with tarfile.open(package) as archive:
        files = {member.name: member for member in archive.getmembers() if member.isfile()}
        told = json.loads(_read(archive, files["package/data/openmoji.json"]))
        for emoji in told:
            code = emoji["hexcode"]
            svg = _read(archive, files[f"package/color/svg/{code}.svg"]).decode()
            png = resvg_py.svg_to_bytes(
                svg_string=svg,
                width=side,
                height=side,
                background="white",
                skip_system_fonts=True,  # They take long to load, and differ between machines.
            )
            (out / f"{code}.png").write_bytes(bytes(png))
            group = emoji["skintone_base_hexcode"] or code
            entry = {"file": f"{code}.png", "caption": emoji["annotation"], "group": group}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (out / CAPTIONS).write_text("".join(lines), encoding="utf-8")
    (out / "LICENSE").write_text(_LICENCE.format(side=side, package=package.name))
    return len(lines)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    with stream:
        return stream.read()


def main(argv: list[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Draw OpenMoji's emojis, with their names.")
    parser.add_argument("package", type=Path, help="the .tgz of `npm pack openmoji@17.0.0`")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--side", type=int, default=72, help="pixels (72)")
    args = parser.parse_args(argv)
    try:
        count = make_pictures(args.package, args.out, args.side)
    except (KeyError, OSError, tarfile.TarError) as error:
        print(f"error: {args.package} is no package of openmoji: {error}", file=sys.stderr)
        return 2
    print(f"{count} pictures to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
