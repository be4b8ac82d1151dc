"""Places of remotes: what is one, and that no secret gets in."""

from pathlib import Path

import pytest

from qbackup.formats.remote_url import Place, parse_endpoint, parse_remote_url


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://bucket", Place(kind="s3", bucket="bucket")),
        ("s3://bucket/", Place(kind="s3", bucket="bucket")),
        ("s3://my.bucket/a/b/", Place(kind="s3", bucket="my.bucket", prefix="a/b")),
        ("gs://bucket/x", Place(kind="gs", bucket="bucket", prefix="x")),
        ("az://container/x", Place(kind="az", bucket="container", prefix="x")),
        ("/mnt/nas", Place(kind="directory", directory=Path("/mnt/nas"))),
        ("file:///mnt/nas", Place(kind="directory", directory=Path("/mnt/nas"))),
    ],
)
def test_a_place_is_read(text: str, place: Place) -> None:
    assert parse_remote_url(text) == place


@pytest.mark.parametrize(
    "text",
    [
        "", "bucket", "mnt/nas", "http://host/bucket", "s3:bucket", "s3://", "s3:///x", "file://mnt",
        "s3://b", "s3://bucket/a//b", "s3://bucket/../x", "s3://bucket/.", "s3://bucket/a?b=c",
        "s3://bucket/a b", "s3://bucket/" + "a" * 101, "s3://bucket/a\nb",
    ],
)  # fmt: skip
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_remote_url(text)


@pytest.mark.parametrize(
    "parse_it",
    [
        lambda: parse_remote_url("s3://AKIA:hidden@bucket/x"),
        lambda: parse_remote_url("ftp://AKIA:hidden@bucket/x"),
        lambda: parse_endpoint("https://AKIA:hidden@host"),
        lambda: parse_endpoint("https://host/?key=hidden"),
        lambda: parse_endpoint("ftp://AKIA:hidden@host"),
    ],
)
def test_a_password_is_refused_and_not_told(parse_it: object) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_it()  # type: ignore[operator]
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["https://s3.example.org", "http://127.0.0.1:7480", "https://[::1]:443", "https://h/s3"]
)
def test_an_endpoint_is_an_address(text: str) -> None:
    assert parse_endpoint(text + "/") == text


@pytest.mark.parametrize("text", ["", "host", "host:80", "https://", "https://h:x", "https://a b"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        parse_endpoint(text)
