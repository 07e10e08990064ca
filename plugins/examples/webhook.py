"""Post to a webhook when an alert comes. Teaches: another plugin's events, and asking the network."""

import asyncio
import json
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPClientError

from spywatcher import PluginSettings, Spy, on

#: Seconds of one attempt: all three, with the pauses, have to fit into [plugins] handler_timeout.
PATIENCE = 1.0


class Settings(PluginSettings, frozen=True):
    #: Where to post; empty: nowhere.
    url: str = ""


@on("alert:multiClient")
async def notify(alert: dict[str, Any], spy: Spy) -> None:
    if not spy.settings.url:
        return
    text = f"{alert['username']} is on {', '.join(alert['platforms'])}"  # or "@everyone is on"
    for pause in (0.0, 0.2, 0.4):  # seconds, before each attempt
        await asyncio.sleep(pause)
        try:
            await AsyncHTTPClient().fetch(
                spy.settings.url,
                method="POST",
                headers={"Content-Type": "application/json"},
                body=json.dumps({"content": text, "allowed_mentions": {"parse": []}}),
                request_timeout=PATIENCE,
            )
        except (OSError, HTTPClientError) as error:
            spy.log.info("not posted: %s", error)
        else:
            return
    spy.log.warning("nobody was told that %s", text)
