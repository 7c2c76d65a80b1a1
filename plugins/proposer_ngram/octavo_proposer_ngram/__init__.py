"""Prompt lookup: guesses that what followed the last tokens before follows them again."""

from octavo import ProposerSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[ProposerSpec]:
    return [
        ProposerSpec(
            name="ngram",
            summary="Looks up where the last tokens stood before and guesses what followed them",
            target="octavo_proposer_ngram.proposer:NgramProposer",
            options="octavo_proposer_ngram.options:NgramOptions",
        )
    ]
