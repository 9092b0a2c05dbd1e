"""Archives are read whole: whatever ends one early, or hides a member of it, is one line."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import tar_of

from shards.archives import DamagedArchive, list_members, read_archive

FILES = {f"folder/{number}.bin": bytes([65 + number]) * (300 * number + 1) for number in range(4)}
PLAIN = tar_of(FILES)
BLOCK = tarfile.BLOCKSIZE
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(content: bytes, path: Path = Path("some.tar")) -> dict[str, bytes]:
    members = list_members(path, io.BytesIO(content))
    return {each.name: content[each.offset : each.offset + each.size] for each in members}


def packed(*members: tarfile.TarInfo, kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Return an archive of members as they are, each of a regular file's size in letters."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, target
    return info


def headers(content: bytes) -> list[int]:
    """Return where the headers of an archive's members begin."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [info.offset for info in tar]


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["short", "ü" * 20, f"{'long/' * 30}name", "n" * 300])
def test_an_archive_of_any_format_is_read(kind: int, name: str):
    name = name[:80] if kind == tarfile.USTAR_FORMAT else name
    content = packed(member("first", 513), member(name, 512), member("empty"), member("last", 1), kind=kind)
    assert read(content) == {"first": b"x" * 513, name: b"x" * 512, "empty": b"", "last": b"x"}


@pytest.mark.parametrize("padding", [0, BLOCK, 20 * BLOCK])
def test_folders_and_the_padding_of_a_tape_are_no_members(padding: int):
    content = packed(member("a", kind=tarfile.DIRTYPE), member("a/b", 3), member("a", kind=tarfile.DIRTYPE))
    assert read(content + bytes(padding)) == {"a/b": b"xxx"}
    assert read(packed()) == {}


def test_hard_and_symbolic_links_are_what_they_link_to():
    content = packed(
        member("a/one", 3),
        member("a/hard", kind=tarfile.LNKTYPE, target="a/one"),
        member("b/early", kind=tarfile.SYMTYPE, target="../c/two"),
        member("c/two", 5),
        member("b/chain", kind=tarfile.SYMTYPE, target="../a/hard"),
    )
    assert {name: len(data) for name, data in read(content).items()} == {
        "a/one": 3,
        "a/hard": 3,
        "b/early": 5,
        "c/two": 5,
        "b/chain": 3,
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (packed(member("a", kind=tarfile.SYMTYPE, target="/etc/passwd")), "a is a link to /etc/passwd, which is not"),
        (packed(member("a", kind=tarfile.SYMTYPE, target="a")), "a is a link to a"),
        (packed(member("a", kind=tarfile.LNKTYPE, target="../b")), "a is a link to ../b"),
        (packed(member("a", kind=tarfile.FIFOTYPE)), "a is of type '6', not a plain file"),
        (packed(member("a", kind=tarfile.CHRTYPE)), "a is of type '3', not a plain file"),
    ],
)
def test_what_is_no_file_is_not_passed_over(content: bytes, told: str):
    with pytest.raises(ValueError, match=r"^some\.tar") as raised:
        read(content)
    assert told in str(raised.value)


def _flip(content: bytes, at: int, bit: int = 1) -> bytes:
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


END = headers(PLAIN)[-1] + BLOCK * 3
DAMAGES: dict[str, bytes] = {
    "nothing at all": b"",
    "something else": b"\xff\xd8" * 2000,
    "a member's header is zeros": PLAIN[: headers(PLAIN)[1]] + bytes(BLOCK) + PLAIN[headers(PLAIN)[1] + BLOCK :],
    "two headers are zeros": PLAIN[: headers(PLAIN)[1]] + bytes(2 * BLOCK) + PLAIN[headers(PLAIN)[1] + BLOCK * 2 :],
    "a block is lost": PLAIN[: headers(PLAIN)[1]] + PLAIN[headers(PLAIN)[1] + BLOCK :],
    "a block comes twice": PLAIN[: headers(PLAIN)[2]] + PLAIN[headers(PLAIN)[2] - BLOCK :],
    "cut between two members": PLAIN[: headers(PLAIN)[2]],
    "cut within a header": PLAIN[: headers(PLAIN)[2] + 100],
    "cut within a file": PLAIN[: headers(PLAIN)[2] + BLOCK + 7],
    "cut within the end": PLAIN[: END + BLOCK],
    "no end": PLAIN[:END],
    "two archives in one file": PLAIN + PLAIN,
    "trailing rubbish": PLAIN + bytes(BLOCK) + b"rubbish",
    "a size below zero": member("a", -BLOCK).tobuf(tarfile.GNU_FORMAT) + bytes(4 * BLOCK),
    "a size beyond all files": member("a", 2**70).tobuf(tarfile.GNU_FORMAT) + bytes(4 * BLOCK),
    "an extension without its member": packed(member("n" * 300, 3))[: 3 * BLOCK],
    "a size in no digits": packed(member("a", 3)).replace(b"00000000003\0", b"0000000000?\0", 1),
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line_with_the_archive_and_the_byte(content: bytes):
    with pytest.raises(DamagedArchive, match=r"^some\.tar is damaged at byte [\d,]+ .*: download it again$") as raised:
        read(content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
@given(data=st.data())
def test_no_flipped_bit_of_a_header_loses_a_file(kind: int, data: st.DataObject):
    whole = packed(member("first", 600), member(f"{'é' * 40}/{'é' * 40}", 700), member("last", 5), kind=kind)
    blocks = [block for block in range(len(whole) // BLOCK) if whole[block * BLOCK + 257 :].startswith(b"ustar")]
    at = data.draw(st.sampled_from(blocks)) * BLOCK + data.draw(st.integers(0, BLOCK - 1))
    try:
        found = read(_flip(whole, at, 1 << data.draw(st.integers(0, 7))))
    except ValueError:
        return
    assert found == read(whole)  # the bit was one that says nothing, as behind the digits of a checksum


@given(cut=st.integers(0, END + 2 * BLOCK - 1))
def test_no_cut_archive_is_read(cut: int):
    with pytest.raises(DamagedArchive):
        read(PLAIN[:cut])


def test_an_archive_within_another_ends_where_its_member_ends():
    inner = tar_of({"1.JPEG": b"one", "2.JPEG": b"two"})
    assert list(FILES) == list(read(PLAIN))
    for cut in (1024, 1600):
        content = tar_of({"n1.tar": inner[:cut], "n2.tar": inner})
        first, _ = list_members(Path("outer.tar"), io.BytesIO(content))
        with pytest.raises(DamagedArchive, match="reaches beyond the end"):
            list_members(Path("outer.tar"), io.BytesIO(content), first.offset, first.offset + first.size)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_small_archive_may_be_compressed(tmp_path: Path, pack: Callable[[bytes], bytes]):
    (tmp_path / "a.tar.gz").write_bytes(pack(PLAIN))
    assert read_archive(tmp_path / "a.tar.gz", ("2.bin", "none")) == {"2.bin": FILES["folder/2.bin"]}


@pytest.mark.parametrize("at", [-1, -5, 1, 40, 90])
def test_a_compressed_archive_is_held_against_its_checksum(tmp_path: Path, at: int):
    packed = gzip.compress(PLAIN, mtime=0)
    (tmp_path / "a.tar.gz").write_bytes(_flip(packed, at % len(packed)))
    with pytest.raises(DamagedArchive, match=r"a\.tar\.gz is damaged"):
        read_archive(tmp_path / "a.tar.gz", ("2.bin",))
    (tmp_path / "a.tar.gz").write_bytes(packed[:-9])
    with pytest.raises(DamagedArchive, match=r"a\.tar\.gz is damaged"):
        read_archive(tmp_path / "a.tar.gz", ("2.bin",))
