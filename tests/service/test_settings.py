from __future__ import annotations

from pathlib import Path

import pytest

from argrad_service.settings import Settings, SettingsError, flag, load_settings, render_configuration, variable

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def test_the_document_is_what_the_settings_generate():
    assert DOCUMENT.read_text() == render_configuration(), (
        "run: python -m argrad_service.settings > docs/configuration.md"
    )


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_with_variable_and_flag(name: str):
    assert Settings.model_fields[name].description
    row = next(line for line in render_configuration().splitlines() if f"`{variable(name)}`" in line)
    assert f"`{flag(name)}`" in row


def test_defaults_listen_on_loopback_only():
    settings = load_settings()
    assert (settings.host, settings.port, settings.is_loopback) == ("127.0.0.1", 8000, True)
    assert settings.max_json_bytes == 2 * 1024**2


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("", False), ("127.evil.example", False)],
)
def test_loopback_is_told_from_the_rest(host: str, is_loopback: bool):
    assert load_settings(host=host, insecure=True).is_loopback is is_loopback


def test_another_address_needs_keys_or_the_word(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"ARGRAD_HOST is '::', which others may reach, .*`argrad keys new NAME`"):
        load_settings(host="::")
    for more in ({"insecure": "true"}, {"api_keys": f"a:{'0' * 64}"}, {"api_keys_file": tmp_path / "none"}):
        load_settings(host="::", **more)
    assert load_settings(uds=tmp_path / "socket", host="::").is_loopback


def test_files_hold_what_should_not_be_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ARGRAD_STATE_SECRET").write_text("a secret in a file\n")
    (tmp_path / "ARGRAD_REDIS_URL").write_text("redis://:a-password@redis:6379/0\n")
    (tmp_path / "api-keys").write_text("no setting\n")
    monkeypatch.setenv("ARGRAD_SECRETS_DIR", str(tmp_path))
    settings = load_settings()
    assert settings.secrets_dir == tmp_path
    assert settings.state_secret.get_secret_value() == "a secret in a file"
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://:a-password@redis:6379/0"
    assert "a-password" not in repr(settings)
    monkeypatch.setenv("ARGRAD_STATE_SECRET", "a secret in a variable")
    assert load_settings().state_secret.get_secret_value() == "a secret in a variable"
    assert load_settings(state_secret="a secret in a flag").state_secret.get_secret_value() == "a secret in a flag"


def test_a_folder_of_secrets_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        SettingsError, match=r"ARGRAD_SECRETS_DIR \(flag --secrets-dir\) cannot be '/none': there is no"
    ):
        load_settings(secrets_dir="/none")
    (tmp_path / "ARGRAD_REDIS_URL").write_text("http://:a-password@redis")
    with pytest.raises(SettingsError, match=r"ARGRAD_REDIS_URL .* cannot be that value: it begins with redis://"):
        load_settings(secrets_dir=str(tmp_path))

    def refuse(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SettingsError, match=r"SECRETS_DIR .*Permission denied: .*ARGRAD_REDIS_URL'"):
        load_settings(secrets_dir=str(tmp_path))


def test_every_page_may_call_only_with_keys():
    with pytest.raises(SettingsError, match=r"ARGRAD_CORS_ORIGINS cannot be \*: without API keys"):
        load_settings(cors_origins="https://a.example,*")
    assert load_settings(cors_origins="*", api_keys=f"a:{'0' * 64}").cors_origins == ("*",)


def test_words_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARGRAD_ALLOWED_HOSTS", " a.example, b.example ,")
    assert load_settings().allowed_hosts == ("a.example", "b.example")


def test_a_key_in_place_of_its_digest_is_not_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARGRAD_API_KEYS", "alice:argrad_hunter2")
    message = r"ARGRAD_API_KEYS .* cannot be that value: the list, line 1: found something else than name:sha256"
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_environment_is_read_and_arguments_come_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARGRAD_PORT", "9001")
    monkeypatch.setenv("ARGRAD_MAX_BODY_BYTES", "1.5GiB")
    settings = load_settings(port="9002")
    assert (settings.port, settings.max_body_bytes) == (9002, 1536 * 1024**2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "port",
            "70000",
            r"ARGRAD_PORT \(flag --port\) cannot be '70000': input should be less than or equal to 65535",
        ),
        ("port", "abc", r"ARGRAD_PORT .* cannot be 'abc': input should be a valid integer"),
        ("device", "tpu", r"ARGRAD_DEVICE .* cannot be 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
        ("max_body_bytes", "-3", r"ARGRAD_MAX_BODY_BYTES .* cannot be '-3'"),
        ("timeout_s", "inf", r"ARGRAD_TIMEOUT_S .* cannot be 'inf': input should be a finite number"),
        ("cors_origins", "example.org", r"ARGRAD_CORS_ORIGINS .*: found 'example.org', wanted \* or scheme and host"),
        (
            "allowed_hosts",
            "http://box",
            r"ARGRAD_ALLOWED_HOSTS .*: found 'http://box', wanted a name as in box.example",
        ),
        ("allowed_hosts", "a.example,*.b.example", r"found '\*.b.example', wanted a name as in box.example, without"),
        ("allowed_hosts", "box.example:8000", r"found 'box.example:8000', wanted a name"),
        ("metrics_port", "8000", r"ARGRAD_METRICS_PORT and ARGRAD_PORT are both 8000: metrics are served apart"),
        ("max_iterations", "1000000000", r"ARGRAD_MAX_ITERATIONS .* cannot be '1000000000'"),
    ],
)
def test_wrong_values_name_the_variable_and_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
):
    monkeypatch.setenv(variable(name), value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


@pytest.mark.parametrize("name", ["box", "a.box.example", "replica_1", "fd00::1", "10.0.0.7", "Box.Example"])
def test_names_of_hosts(name: str):
    assert load_settings(allowed_hosts=f"{name},other").allowed_hosts == (name, "other")


def test_a_wrong_secret_is_not_printed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARGRAD_STATE_SECRET", "hunter2")
    with pytest.raises(SettingsError, match=r"ARGRAD_STATE_SECRET .* cannot be that value: .*at least 16") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_the_secret_is_random_and_hidden():
    first, second = load_settings(), load_settings()
    assert first.state_secret.get_secret_value() != second.state_secret.get_secret_value()
    assert first.state_secret.get_secret_value() not in repr(first)


def test_an_unknown_argument_is_refused():
    with pytest.raises(SettingsError, match="prot is not a setting"):
        load_settings(prot=1)


def test_limits_are_the_settings_of_that_name():
    limits = load_settings(max_variables=7, max_work_bytes="1KiB").limits()
    assert (limits.variables, limits.work_bytes, limits.iterations) == (7, 1024, 10_000)
