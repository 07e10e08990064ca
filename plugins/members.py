"""Tell dashboards who joins, who leaves and who gains roles. Teaches: comparing with how it was before."""

from datetime import UTC, datetime

import hikari

from spywatcher import Payload, Spy, on, role_name, user_name


class UserJoin(Payload):
    user_id: str
    username: str
    account_age_days: int


class UserLeave(Payload):
    user_id: str
    username: str


class RoleChange(Payload):
    user_id: str
    username: str
    added_roles: list[str]


@on(hikari.MemberCreateEvent, emit="user:join")
def user_join(event: hikari.MemberCreateEvent) -> UserJoin:
    age = datetime.now(UTC) - event.user.created_at
    return UserJoin(
        user_id=str(event.user_id),
        username=user_name(event.user),
        account_age_days=max(0, age.days),  # Discord's clock may be ahead of ours
    )


@on(hikari.MemberDeleteEvent, emit="user:leave")
def user_leave(event: hikari.MemberDeleteEvent) -> UserLeave:
    return UserLeave(user_id=str(event.user_id), username=user_name(event.user))


@on(hikari.MemberUpdateEvent, emit="role:change", settled=True)
def role_change(event: hikari.MemberUpdateEvent, spy: Spy) -> RoleChange | None:
    if event.old_member is None:  # not cached: everything would look new
        return None
    gained = set(event.member.role_ids) - set(event.old_member.role_ids)
    roles = [role for role_id in gained if (role := spy.bot.cache.get_role(role_id))]
    if not roles:
        return None
    return RoleChange(
        user_id=str(event.user_id),
        username=user_name(event.user),
        added_roles=[
            role_name(role) for role in sorted(roles, key=lambda role: (-role.position, role.id))
        ],
    )
