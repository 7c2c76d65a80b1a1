"""A draft model: a smaller model of the same vocabulary runs ahead of the served one."""

from octavo import ProposerSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[ProposerSpec]:
    return [
        ProposerSpec(
            name="draft_model",
            summary="A smaller model of the same vocabulary runs ahead",
            target="octavo_proposer_draft_model.proposer:DraftModelProposer",
            options="octavo_proposer_draft_model.options:DraftModelOptions",
            draft_model=True,
        )
    ]
