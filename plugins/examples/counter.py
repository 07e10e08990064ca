"""Count messages, and serve a page that shows how many. Teaches: `route`, and keeping a number.

A page is open to anybody who can reach the server: this one tells nothing but a number.
"""

from collections import Counter

import hikari
from tornado.web import RequestHandler

from spywatcher import Spy, every, on, route

counted: Counter[str] = Counter()


def setup(spy: Spy) -> None:
    file = spy.data_dir / "counter.txt"
    counted["messages"] = int(file.read_text("utf-8")) if file.exists() else 0


@on(hikari.GuildMessageCreateEvent)
def count(event: hikari.GuildMessageCreateEvent) -> None:
    counted["messages"] += 1


@every(10)
def teardown(spy: Spy) -> None:
    (spy.data_dir / "counter.txt").write_text(str(counted["messages"]), "utf-8")


@route("/counter")
class CounterPage(RequestHandler):
    def get(self) -> None:
        self.set_header("Content-Security-Policy", "default-src 'none'")
        self.finish(f"<!doctype html><title>Counter</title><p>{counted['messages']} messages</p>")
