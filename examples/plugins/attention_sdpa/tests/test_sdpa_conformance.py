"""The backend keeps Octavo's contract, with its default options and with others."""

from typing import ClassVar

from octavo.testing import AttentionSuite


class TestSDPA(AttentionSuite):
    component = "attention-sdpa/sdpa"


class TestSDPAInSlices(AttentionSuite):
    component = "attention-sdpa/sdpa"
    options: ClassVar = {"max_query_tokens": 5}
