"""What somebody who mistyped a word may have meant."""

from qbackup.model.similar import did_you_mean


def test_the_known_word_that_is_most_like_it_is_named() -> None:
    assert did_you_mean("vm11", {"vm1", "web", "mail"}) == "did you mean vm1?"
    assert did_you_mean("mial", ["web", "mail", "vm1"]) == "did you mean mail?"


def test_nothing_is_guessed_where_nothing_is_like_it() -> None:
    assert did_you_mean("database", {"vm1", "web"}) is None
    assert did_you_mean("x", ()) is None
