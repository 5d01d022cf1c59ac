"""Where the published datasets lie: official locations, and the checksums their publishers give."""

from __future__ import annotations

from dataclasses import dataclass

from ffpretrain.datasets.md17 import SETS
from ffpretrain.datasets.qm9 import ARCHIVE, UNCHARACTERIZED_LIST
from ffpretrain.datasets.rmd17 import MOLECULES
from ffpretrain.errors import DataError, nearest


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch.

    Attributes:
        name: under which it is kept.
        urls: the publisher's location first, then mirrors of the same bytes.
        md5: the publisher's checksum; None where none is given, then the download is unverified.
        size: in bytes, where published.
    """

    name: str
    urls: tuple[str, ...]
    md5: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Download:
    """One dataset to fetch.

    Attributes:
        summary: one line for listings.
        folder: in the cache folder.
        files: to fetch.
        unpacked: files that are there once the archives among ``files`` are unpacked; empty where none is.
        licence: of the data, where the publisher states one.
    """

    summary: str
    folder: str
    files: tuple[RemoteFile, ...]
    unpacked: tuple[str, ...] = ()
    licence: str | None = None


_FIGSHARE = "https://figshare.com/ndownloader/files/"
_SGDML = "http://www.quantum-machine.org/gdml/data/npz/"

# figshare article 12672038, version 3, and the Materials Cloud copy of the same archive
_RMD17 = RemoteFile(
    "rmd17.tar.bz2",
    (
        _FIGSHARE + "23950376",
        "https://archive.materialscloud.org/records/pfffs-fff86/files/rmd17.tar.bz2?download=1",
    ),
    md5="cb1a927628d96f2e966025da4fb63d18",
    size=1_066_301_513,
)
# figshare collection 978904
_QM9 = (
    RemoteFile(ARCHIVE, (_FIGSHARE + "3195389",), md5="ad1ebd51ee7f5b3a6e32e974e5d54012", size=86_144_227),
    RemoteFile(
        UNCHARACTERIZED_LIST, (_FIGSHARE + "3195404",), md5="a361887bacb427b8a0ce7903d92a53b4", size=486_752
    ),
)


def _md17(name: str) -> Download:
    chosen = SETS[name]
    if chosen.paired:
        stem = chosen.files[0].removesuffix("-train.npz")
        files = (RemoteFile(f"{stem}.zip", (f"{_SGDML}{stem}.zip",)),)
        return Download(f"{name}, {chosen.level_of_theory}", "md17", files, unpacked=chosen.files)
    # the publisher gives no checksums for these
    files = (RemoteFile(chosen.files[0], (_SGDML + chosen.files[0],)),)
    return Download(f"MD17 {name}, {chosen.level_of_theory}", "md17", files)


CATALOG: dict[str, Download] = {
    "rmd17": Download(
        "revised MD17, ten molecules of 100,000 frames and five splits, 1.1 GB",
        "rmd17",
        (_RMD17,),
        unpacked=tuple(f"rmd17/npz_data/rmd17_{molecule}.npz" for molecule in MOLECULES),
        licence="CC0-1.0",
    ),
    "qm9": Download("QM9, 133,885 molecules with 15 properties, 86 MB", "qm9", _QM9, licence="CC0-1.0"),
    **{f"md17-{name}": _md17(name) for name in SETS},
}
"""The datasets that ``ffpretrain data download`` knows, by name."""


def find_download(name: str) -> Download:
    """Return a dataset of the catalog.

    Raises:
        DataError: there is none of that name; the nearest names are offered.
    """
    if name not in CATALOG:
        raise DataError(f"no dataset {name!r} to download{nearest(name, CATALOG)}")
    return CATALOG[name]
