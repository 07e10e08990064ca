"""Fails to stop."""


async def teardown(spy):
    raise RuntimeError("boom at teardown")
