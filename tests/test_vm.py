"""The service under a real systemd, installed as docs/deploy.md says, then broken as days break it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from machine import Machine, booted, missing_programs
from service import ROOT

#: The machine is made in the time of the first test; an emulated processor is slow.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

DEPLOY = (ROOT / "docs" / "deploy.md").read_text("utf-8")
SECRET = "an old owl sat in an oak, the more it saw the less it spoke"
CONFIG = "/etc/spywatcher/config.toml"
LIVE = "localhost:3001/health/live"
#: The pretend Discord of the machine, with what its developer portal is told.
PLAY = """
import asyncio, simulator

async def play():
    async with simulator.PretendDiscord(port=8123) as discord:
        app, guild = discord.oauth2, discord.add_guild()
        app.redirect_uris.add("https://localhost/signin/callback")
        for name, value in {
            "rest_url": discord.rest_url, "owner": guild.owner.id, "client_id": app.client_id,
            "client_secret": app.client_secret, "token": discord.token,
        }.items():
            print(f'{name} = "{value}"')
        await asyncio.Event().wait()

asyncio.run(play())
"""
#: Seconds that a start may take there: an emulated processor is slow.
START = 900.0


def block(heading: str, language: str, number: int = 0) -> str:
    """A block of code of the page, by the heading that it stands under."""
    part = DEPLOY.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture(scope="module")
def vps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the commands of the page were run, one after the other."""
    if missing := missing_programs():
        pytest.exit(f"needs Debian's programs {', '.join(missing)}", 2)
    with booted(tmp_path_factory.mktemp("vm")) as machine:
        start_discord(machine)
        install(machine)
        wait_ready(machine)
        yield machine


def wait_ready(vps: Machine) -> None:
    """Until all parts are well, Discord's too."""
    ready = "curl -sf localhost:3001/health/ready"
    vps.until(ready, lambda said: '"status": "ready"' in said, within=START)


def start_discord(vps: Machine) -> None:
    subprocess.run(["make", "bundle", "BUNDLE_PYTHONS=3.11"], cwd=ROOT, check=True)
    vps.run("install -d /opt/spywatcher /etc/spywatcher")
    vps.run_here("scp dist/spywatcher.pyz HOST:/root/discord.pyz", ROOT)
    vps.write("/root/discord.py", PLAY)
    vps.run(
        "systemd-run --unit=discord --setenv=SHIV_INTERPRETER=1"
        " --setenv=SHIV_ROOT=/root/shiv --setenv=PYTHONUNBUFFERED=1"
        " python3 /root/discord.pyz /root/discord.py"
    )
    vps.until("journalctl -u discord -o cat", lambda said: "token = " in said, within=START)


def discord_says(vps: Machine, key: str) -> str:
    said = vps.run("journalctl -u discord -o cat")
    return re.findall(rf'^{key} = "(.*)"$', said, re.MULTILINE)[0]


def install(vps: Machine) -> None:
    """The ten commands; the bundle has been made, and what they install is there."""
    here, there = block("Ten commands", "sh", 0), block("Ten commands", "sh", 1)
    for command in here.splitlines():
        if command.startswith(("ssh", "scp")):
            command = command.replace("apt-get update && apt-get install", "echo")
            vps.run_here(command.partition("  #")[0], ROOT)
    given = {"secret": SECRET, "token": discord_says(vps, "token")}
    for line in there.splitlines():
        command = line.partition("   #")[0].replace("YOUR.NAME", "localhost")
        if command.startswith("nano"):
            rest_url = f'[discord]\nrest_url = "{discord_says(vps, "rest_url")}"'
            vps.write(CONFIG, block("Ten commands", "toml").replace("[discord]", rest_url))
        else:
            name = command.rpartition("/")[2].strip()
            vps.run(command, given=given.get(name, ""))


@pytest.fixture
def mended(vps: Machine) -> Iterator[Machine]:
    """A machine whose files are put back after a test has broken one of them."""
    vps.run("cp -a /etc/spywatcher /root/sound")
    yield vps
    vps.run("rm -rf /etc/spywatcher && mv /root/sound /etc/spywatcher")
    vps.run("rm -rf /etc/systemd/system/spywatcher.service.d; systemctl daemon-reload")
    vps.run("systemctl reset-failed; systemctl restart spywatcher")
    wait_ready(vps)


def knock(vps: Machine) -> None:
    """Somebody connects."""
    vps.run(f"curl -s --max-time 5 {LIVE}", check=False)


def starts(vps: Machine) -> int:
    return int(vps.run("journalctl -u spywatcher -o cat | grep -c ^Starting"))


def assert_stays_down(vps: Machine, reason: str) -> None:
    """Service and socket, whoever knocks; the reason stands last where operators look."""
    vps.until("systemctl is-active spywatcher.socket", lambda said: "inactive" in said)
    before = starts(vps)
    for _ in range(3):
        knock(vps)
    journal = vps.run("journalctl -u 'spywatcher*' -o short-precise -n 60")
    assert vps.run("systemctl is-failed spywatcher").strip() == "failed", journal
    assert starts(vps) == before, journal
    for where in ("systemctl status spywatcher; true", "journalctl -p err"):
        vps.until(where, lambda said: re.search(reason, said.strip().splitlines()[-1]) is not None)


def test_it_is_installed_and_ready_after_the_ten_commands(vps: Machine) -> None:
    assert "Active: active (running)" in vps.run("systemctl status spywatcher")
    assert "guilds" in vps.run("systemctl show -P StatusText spywatcher")


def test_it_is_sandboxed(vps: Machine) -> None:
    said = vps.run("systemd-analyze security spywatcher.service --no-pager | tail -n 1")
    assert float(re.findall(r"level for \S+: ([\d.]+)", said)[0]) < 2.0


def test_a_reload_takes_over_what_can_change_live(mended: Machine) -> None:
    mended.run(f"printf '[limits]\\nconnections_per_ip = 7\\n' >>{CONFIG}")
    mended.run("systemctl reload spywatcher")
    mended.until("journalctl -u spywatcher -o cat -n 5", lambda said: "settings reloaded" in said)


def test_a_restart_refuses_no_connection(vps: Machine) -> None:
    knocks = (
        "systemctl restart --no-block spywatcher; for i in $(seq 40); do"
        " curl -s --max-time 600 -o /dev/null -w '%{http_code}\\n' localhost:3001/health/live; done"
    )
    assert set(vps.run(knocks).split()) == {"200"}


def test_a_mistake_in_the_settings_keeps_it_down_until_it_is_mended(mended: Machine) -> None:
    mended.run(f"sed -i 's/cors_origins/cors_origin/' {CONFIG}; systemctl restart spywatcher; true")
    assert_stays_down(mended, r"server\.cors_origin: .*did you mean cors_origins")
    mended.run(f"sed -i 's/cors_origin/cors_origins/' {CONFIG}; systemctl start spywatcher")
    wait_ready(mended)


def test_a_wrong_bot_token_keeps_it_down(mended: Machine) -> None:
    wrong = "MTIzNDU2Nzg5MDEyMzQ1Njc4.wrong.token-of-nobody"
    mended.run("install -m 600 /dev/stdin /etc/spywatcher/token", given=wrong)
    before = starts(mended)
    mended.run(f"systemd-run --unit=visitors sh -c 'while :; do curl -s {LIVE}; sleep 0.1; done'")
    mended.run("systemctl restart spywatcher", check=False)
    assert_stays_down(mended, r"Discord refused the bot token.*token_file")
    mended.run("systemctl stop visitors")
    assert starts(mended) == before + 1


def test_a_missing_secret_keeps_it_down(mended: Machine) -> None:
    mended.run("rm /etc/spywatcher/secret; systemctl restart spywatcher; true")
    mended.until("systemctl is-active spywatcher.socket", lambda said: "inactive" in said)
    assert "failed" in mended.run("systemctl is-failed spywatcher")


def test_the_watchdog_leaves_the_stack_of_a_plugin_that_blocks(mended: Machine) -> None:
    mended.run("install -d /etc/spywatcher/plugins /etc/systemd/system/spywatcher.service.d")
    plugin = "import time\nfrom spywatcher import every\n\n@every(3)\ndef nap(spy):\n    time.sleep(600)\n"
    mended.write("/etc/spywatcher/plugins/sleeper.py", plugin)
    mended.write(
        "/etc/systemd/system/spywatcher.service.d/quick.conf", "[Service]\nWatchdogSec=8\n"
    )
    mended.run("systemctl daemon-reload; systemctl restart spywatcher")
    mended.until(
        "journalctl -u spywatcher -o cat -n 200",
        lambda said: "sleeper.py" in said and "in nap" in said and "watchdog" in said.lower(),
    )


def test_a_plugin_with_a_syntax_error_is_left_out(mended: Machine) -> None:
    mended.run("install -d /etc/spywatcher/plugins")
    mended.write("/etc/spywatcher/plugins/broken.py", "def (:\n")
    mended.run("systemctl restart spywatcher")
    assert "broken" in mended.run("journalctl -u spywatcher -o cat -p err -n 5")
    assert "active" in mended.run("systemctl is-active spywatcher")


def test_people_sign_in_behind_the_proxy_as_the_page_says(vps: Machine) -> None:
    keep_secret, *rest = block("Sign in with Discord", "sh").splitlines()
    vps.run(keep_secret, given=discord_says(vps, "client_secret"))
    vps.run("\n".join(line for line in rest if not line.startswith(("nano", "systemctl"))))
    client_id = discord_says(vps, "client_id")
    vps.run(f"sed -i 's/THE CLIENT ID/{client_id}/; s/YOUR.NAME/localhost/' {CONFIG}")
    vps.run(rest[-1])
    wait_ready(vps)
    curl = "curl -skL --max-time 60 -c jar -b jar"
    asks = vps.run(f"{curl} -o /dev/null -w '%{{url_effective}}' https://localhost/signin")
    vps.run(f"{curl} -d user={discord_says(vps, 'owner')} '{asks}'")
    said = vps.run(f"{curl} -X POST https://localhost/signin/token")
    assert '"username": "owner"' in said


def test_counts_are_backed_up_and_restored_as_the_page_says(vps: Machine) -> None:
    vps.run(block("Back up, upgrade, roll back", "sh", 0))
    assert "spywatcher.db" in vps.run("tar tzf /root/spywatcher-*.tgz")
    vps.run(block("Back up, upgrade, roll back", "sh", 1))
    wait_ready(vps)


def test_a_new_version_is_put_in_and_taken_back_as_the_page_says(vps: Machine) -> None:
    vps.run_here("scp dist/spywatcher.pyz HOST:/opt/spywatcher/new.pyz", ROOT)
    vps.run(block("Back up, upgrade, roll back", "sh", 2))
    vps.run(block("Back up, upgrade, roll back", "sh", 3))
    wait_ready(vps)


def test_it_is_there_again_after_a_reboot(vps: Machine) -> None:
    vps.reboot()
    vps.until(f"curl -s {LIVE}", lambda said: "live" in said, within=START)


def test_it_stops_within_its_time(vps: Machine) -> None:
    vps.run("systemctl stop spywatcher.socket spywatcher")
    assert vps.run("systemctl show -P Result spywatcher").strip() == "success"
