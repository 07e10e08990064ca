"""Tell dashboards who loses roles. Teaches: `settled`, for what only looks like news at the start."""

import hikari

from spywatcher import Payload, Spy, on, role_name, user_name


class RoleRemoved(Payload):
    user_id: str
    username: str
    removed_roles: list[str]


@on(hikari.MemberUpdateEvent, emit="role:removed", settled=True)
def role_removed(event: hikari.MemberUpdateEvent, spy: Spy) -> RoleRemoved | None:
    if event.old_member is None:  # not known before: there is nothing to compare with
        return None
    lost = set(event.old_member.role_ids) - set(event.member.role_ids)
    roles = [role for one in lost if (role := spy.bot.cache.get_role(one))]
    if not roles:  # none lost, or the role itself was deleted
        return None
    return RoleRemoved(
        user_id=str(event.user_id),
        username=user_name(event.user),
        removed_roles=sorted(role_name(role) for role in roles),
    )
