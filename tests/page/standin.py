import hikari

from spywatcher import on, on_subscribe


def plat(p):
    s = p.client_status
    return sorted(
        n
        for n, v in {"desktop": s.desktop, "mobile": s.mobile, "web": s.web}.items()
        if v != hikari.Status.OFFLINE
    )


@on_subscribe("guild", emit="presence:snapshot")
def snapshot(guild_id, spy):
    g = int(guild_id)
    rows = []
    for m in spy.bot.cache.get_members_view_for_guild(g).values():
        if m.is_bot:
            continue
        p = spy.bot.cache.get_presence(g, m.id)
        rows.append(
            {
                "userId": str(m.id),
                "username": m.username,
                "status": "offline" if p is None else str(p.visible_status),
                "platforms": plat(p) if p else [],
            }
        )
    counts = {s: sum(r["status"] == s for r in rows) for s in ("online", "idle", "dnd", "offline")}
    return {"counts": counts, "members": rows[:500], "truncated": False}


@on(hikari.MemberDeleteEvent, emit="user:leave")
def user_leave(event, spy):
    return {"userId": str(event.user_id), "username": str(event.user.username)}
