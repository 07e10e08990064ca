"""Never gets ready."""

import asyncio


async def setup(spy):
    await asyncio.Event().wait()
