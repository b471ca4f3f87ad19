"""`server.toml`: what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.errors import ConfigError, UserError
from fedge_server.hub.home import Home
from fedge_server.hub.settings import Settings
from fedge_server.telemetry.store import Settings as TelemetrySettings


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("")
    settings = Settings.load(tmp_path / "server.toml")
    assert (settings.listen.link_port, settings.listen.enrolment_port) == (9443, 9444)
    assert settings.database_url is None
    assert settings.workers.restarts == 3
    assert settings.telemetry.storing() == TelemetrySettings()  # one set of defaults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[listn]\nhost = 'x'", "unknown key 'listn': did you mean 'listen'?"),
        (
            "[limits]\noffline_grace = 1",
            "unknown key 'limits.offline_grace': did you mean 'offline_grace_s'?",
        ),
        ("[listen]\nlink_port = 65536", "listen.link_port = 65536"),
        ("[listen]\nlink_port = '9443'", "listen.link_port = '9443'"),
        ("listen = 3", "listen = 3: must be a table"),
        ("[public]\nnames = ['https://x/']", "must be a host name or an address"),
        ("[public]\nnames = []", "public.names = []"),
        ("[limits]\noffline_grace_s = 0", "limits.offline_grace_s = 0"),
        ("[limits]\noffline_grace_s = nan", "limits.offline_grace_s = nan"),
        ("[workers]\nrestarts = true", "workers.restarts = True"),
        ("[telemetry]\nfalse_alarms = 1.0", "telemetry.false_alarms = 1.0"),
        ("[telemetry]\nkeep_day = 1", "unknown key 'telemetry.keep_day': did you mean 'keep_days'?"),
        ("[limits", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        Settings.load(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_home_without_settings_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedge-server init"):
        Settings.load(tmp_path / "server.toml")


def test_a_home_is_chosen_by_option_then_by_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGE_HOME", str(tmp_path))
    assert Home.chosen(None).root == tmp_path
    assert Home.chosen(tmp_path / "x").socket == tmp_path / "x" / "hub.sock"
    monkeypatch.delenv("FEDGE_HOME")
    with pytest.raises(UserError, match="FEDGE_HOME"):
        Home.chosen(None)
