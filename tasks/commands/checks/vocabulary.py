"""Whether student and teacher speak of the same tokens."""

from dgpo_core.config.params import Params
from dgpo_core.errors import UserError
from tasks.commands.checks.finding import Finding, error, ok
from tasks.commands.preflight import preflight

SUBJECT = "tokenizers"


def vocabulary(params: Params) -> list[Finding]:
    """What a run looks at before its first stage; a model that is not here yet is looked at when it is."""
    if not params.recipes.need_one_vocabulary:
        return [ok(SUBJECT, "no recipe needs the student's and the teacher's to be the same")]
    try:
        preflight()
    except UserError as why:
        advice = (
            "choose two models of one family (models.student, models.teacher), or recipes without a teacher"
        )
        return [error(SUBJECT, str(why), advice)]
    return [ok(SUBJECT, "the student's and the teacher's agree, as far as both are here")]
