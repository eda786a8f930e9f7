"""Config: flags over environment over defaults, every problem at once, secrets never shown."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

import deploybot
from deploybot import Config, StartError


def load(env=None, **flags):
    return Config.load(flags, env or {})


def problems(env=None, **flags):
    with pytest.raises(StartError) as caught:
        load(env, **flags)
    return caught.value.problems


def test_defaults_are_those_of_the_readme():
    config = load()
    assert (config.host, config.port) == ("0.0.0.0", 8080)
    assert (config.db, config.apps) == (pathlib.Path("./data/deploybot.db"), pathlib.Path("./apps.yaml"))
    assert (config.log_level, config.log_format, config.open) == ("INFO", "plain", False)
    assert (config.agent_timeout, config.lost_after, config.pending_expiry) == (60, 600, 86400)
    assert (config.retention_days, config.log_limit, config.rate_limit) == (90, 10 * 1024 * 1024, 0)
    assert (config.trusted_proxy, config.tls_cert, config.tls_key, config.replicated) == ((), None, None, False)
    assert (config.token, config.agent_token, config.read_token, config.webhook_secret) == (None,) * 4


def test_a_flag_wins_over_the_environment_and_that_over_the_default():
    env = {"DEPLOYBOT_PORT": "1", "DEPLOYBOT_LOST_AFTER": "5m"}
    config = load(env, port="2")
    assert (config.port, config.lost_after, config.host) == (2, 300, "0.0.0.0")
    assert load(env, port=None).port == 1


def test_every_problem_is_told_at_once_with_its_source():
    told = problems({"DEPLOYBOT_LOST_AFTER": "soon", "DEPLOYBOT_TOKEN_FILE": "/nowhere/t"}, port="x", log_level="loud")
    assert len(told) == 4
    for part, line in zip(("--port: 'x'", "--log-level: 'loud'", "DEPLOYBOT_LOST_AFTER: 'soon'", "/nowhere/t"), told, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("30s", 30), ("30", 30), ("1.5m", 90), ("2h", 7200), ("3d", 259200), ("0.001s", 0.001)]
)
def test_durations(text, seconds):
    assert deploybot.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "0.0s", "-1", "1 s", "1w", "s", "1e3", "٣s", "nan", "inf", "1" * 10, "1s\n"])
def test_what_is_no_duration_is_refused(text):
    assert problems(lost_after=text)


@pytest.mark.parametrize("text", ["", "-1", "65536", "80 ", "٨٠", "0x50", "1_0", "100000"])
def test_what_is_no_port_is_refused(text):
    assert problems(port=text)


def test_port_0_lets_the_system_choose():
    assert load(port="0").port == 0


@pytest.mark.parametrize("name", ["retention_days", "rate_limit"])
def test_whole_numbers(name):
    for text in ("0", "1", "365", "007", "999999999"):
        assert getattr(load(**{name: text}), name) == int(text)
    for text in ("", "-1", "1.5", "90d", " 1", "1 ", "1_0", "٣", "0x10", "never", "1" * 10, "1\n"):
        (told,) = problems(**{name: text})
        assert told == f"--{name.replace('_', '-')}: {text!r} must be a whole number, 0 or more"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512KiB", 1 << 19),
        ("10MiB", 10 << 20),
        ("1GiB", 1 << 30),
        ("1.5KiB", 1536),
        ("0.5", 1),
        ("999999999", 999_999_999),
    ],
)
def test_sizes(text, size):
    assert load(log_limit=text).log_limit == size


@pytest.mark.parametrize(
    "text", ["", "0", "0MiB", "0.0", "-1", "10MB", "10 MiB", "10mib", "MiB", "1e6", "٣MiB", "1" * 13, "1MiB\n", "inf"]
)
def test_what_is_no_size_is_refused(text):
    (told,) = problems(log_limit=text)
    assert told == f"--log-limit: {text!r} must be a size such as 512KiB, 10MiB or 1GiB"


def test_proxies_are_addresses_and_networks():
    config = load(trusted_proxy=" 127.0.0.1, 10.0.0.0/8,,::1 ,2001:db8::/32 ")
    assert list(map(str, config.trusted_proxy)) == ["127.0.0.1/32", "10.0.0.0/8", "::1/128", "2001:db8::/32"]
    for text in ("proxy", "10.0.0.1/8", "10.0.0.0/33", "1.2.3", "127.0.0.1;10.0.0.1", "127.0.0.1, proxy.example.com"):
        (told,) = problems({"DEPLOYBOT_TRUSTED_PROXY": text})
        assert told.startswith(f"DEPLOYBOT_TRUSTED_PROXY: {text!r} "), told


def test_a_certificate_and_its_key_come_together():
    config = load({"DEPLOYBOT_TLS_CERT": "c.pem"}, tls_key="k.pem")
    assert (config.tls_cert, config.tls_key) == (pathlib.Path("c.pem"), pathlib.Path("k.pem"))
    for one in ("tls_cert", "tls_key"):
        assert problems(**{one: "x.pem"}) == ("--tls-cert and --tls-key belong together: set both or none",)
        assert problems({"DEPLOYBOT_" + one.upper(): "x.pem"}) == problems(**{one: "x.pem"})


def test_words_are_taken_in_any_case():
    assert load(log_level="debug", log_format="JSON").log_level == "DEBUG"
    assert load(log_format="JSON").log_format == "json"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("Yes", True), ("false", False), ("0", False), ("", False)]
)
def test_open_is_a_switch(text, value):
    assert load({"DEPLOYBOT_OPEN": text}).open is value


def test_open_is_not_opened_by_a_word_that_is_none():
    assert problems({"DEPLOYBOT_OPEN": "maybe"})


def test_secrets_come_from_a_variable_or_a_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text("  from-the-file\n")
    config = load({"DEPLOYBOT_AGENT_TOKEN": "plain", "DEPLOYBOT_READ_TOKEN_FILE": str(path)})
    assert (config.agent_token, config.read_token) == ("plain", "from-the-file")


def test_credentials_of_systemd_are_read(tmp_path):
    """LoadCredential= puts each secret into a file of that folder, where no environment shows it."""
    for name in deploybot.SECRETS:
        (tmp_path / f"deploybot_{name}").write_text(f" of-{name}\n")
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    config = load(env)
    assert {name: getattr(config, name) for name in deploybot.SECRETS} == {name: f"of-{name}" for name in deploybot.SECRETS}
    assert load({**env, "DEPLOYBOT_READ_TOKEN": "mine"}).read_token == "mine", "what is said counts"
    assert (config.tls_cert, config.tls_key) == (None, None)
    for name in ("tls_cert", "tls_key"):
        (tmp_path / f"deploybot_{name}").write_text("x")
    config = load(env)
    assert (config.tls_cert, config.tls_key) == (tmp_path / "deploybot_tls_cert", tmp_path / "deploybot_tls_key")
    assert load({"CREDENTIALS_DIRECTORY": str(tmp_path / "none")}).token is None


def test_an_empty_secret_is_none():
    assert load({"DEPLOYBOT_TOKEN": "", "DEPLOYBOT_TOKEN_FILE": ""}).token is None


def test_a_secret_given_twice_or_in_an_empty_or_odd_file_is_refused(tmp_path):
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    empty.write_text("\n")
    odd.write_bytes(b"\xff\xfe")
    assert "keep one" in problems({"DEPLOYBOT_TOKEN": "x", "DEPLOYBOT_TOKEN_FILE": str(empty)})[0]
    assert "empty file" in problems({"DEPLOYBOT_TOKEN_FILE": str(empty)})[0]
    (told,) = problems({"DEPLOYBOT_TOKEN_FILE": str(odd)})
    assert "DEPLOYBOT_TOKEN" in told and "0xff" not in told, "not one byte of it"
    assert "DEPLOYBOT_TOKEN" in problems({"DEPLOYBOT_TOKEN_FILE": str(tmp_path)})[0]


def test_a_problem_never_tells_a_secret():
    told = problems({"DEPLOYBOT_TOKEN": "hunter2", "DEPLOYBOT_TOKEN_FILE": "/x"})
    assert "hunter2" not in "".join(told)


def test_repr_hides_every_secret():
    config = load({f"DEPLOYBOT_{name.upper()}": "hunter2" for name in deploybot.SECRETS})
    assert config.token == "hunter2"
    assert "hunter2" not in repr(config)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1


def test_each_option_has_a_field_and_no_secret_is_an_option():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields == {option.field for option in deploybot.OPTIONS} | set(deploybot.SECRETS)
    assert not {option.field for option in deploybot.OPTIONS} & set(deploybot.SECRETS)


def test_an_empty_variable_is_not_set():
    """As a line `DEPLOYBOT_PORT=` of .env leaves it."""
    assert load({option.variable: "" for option in deploybot.OPTIONS}) == load()


def test_a_token_is_what_a_header_can_carry():
    for name in ("TOKEN", "AGENT_TOKEN", "READ_TOKEN"):
        for value in ("two words", "a\tb", "é", "a\nb"):
            assert f"DEPLOYBOT_{name}" in problems({f"DEPLOYBOT_{name}": value})[0]
    assert load({"DEPLOYBOT_WEBHOOK_SECRET": "It's a Secret to Everybody"}).webhook_secret == "It's a Secret to Everybody"
