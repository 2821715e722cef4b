import pytest
import torch

from pyllm.data import embedded_corpus, read_text, split


def test_the_embedded_corpus():
    text = embedded_corpus()
    assert 300_000 < len(text) < 1_000_000
    assert text == embedded_corpus()
    assert 'The "assert" statement' in text or "The assert statement" in text


def test_files_are_read_as_they_are(tmp_path):
    one, two, three = (tmp_path / name for name in ("one.txt", "two.txt", "three.txt"))
    one.write_bytes("\ufeff床前\r\n明月光".encode())
    two.write_bytes(b"two\n\n")
    three.write_bytes("e\u0301 \ufeff".encode())
    assert read_text(str(two)) == "two\n\n"
    assert read_text(one) == "床前\r\n明月光"
    assert read_text([one, str(two), three]) == "床前\r\n明月光\ntwo\n\ne\u0301 \ufeff"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "hold text, but is empty"),
        (b"\xef\xbb\xbf", "hold text, but is empty"),
        (b"PK\x03\x04ab\x00\xff", "be UTF-8 text, but is binary: byte 6 is zero"),
        (b"abc\xff", r"be UTF-8 text, but byte 3 \(0xff\) is not: invalid start byte"),
        (b"\xef\xbb\xbfabc\xff", r"be UTF-8 text, but byte 6 \(0xff\) is not: invalid start byte"),
        ("ab床".encode()[:-1], r"be UTF-8 text, but byte 2 \(0xe5\) is not: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_text_is_an_error(tmp_path, data, message):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^\[read_text\] .*bad\.txt must {message}$"):
        read_text([tmp_path / "good.txt", tmp_path / "bad.txt"])


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(IsADirectoryError):
        read_text([tmp_path])
    with pytest.raises(ValueError, match="must name at least one file"):
        read_text([])


def test_split():
    assert split("abcdefghij") == ("abcdefghi", "j")
    assert split(list(range(10)), 0.5) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert split("abc", 0) == ("abc", "")
    train, validation = split(torch.arange(1_115_394))
    assert (len(train), len(validation)) == (1_003_854, 111_540)
    for share in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"validation must be in \[0, 1\), but got"):
            split("abc", share)
    for text in ("", "a"):
        with pytest.raises(ValueError, match="both parts must hold something"):
            split(text, 0.1)


def test_real_text(shared_data):
    text = read_text([shared_data / "wikitext2" / "valid.txt", shared_data / "wikitext2" / "test.txt"])
    assert len(text.encode()) >= 2_300_000
