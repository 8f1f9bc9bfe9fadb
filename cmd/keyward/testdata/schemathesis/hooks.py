"""What every answer of the Management API has to be, besides what its OpenAPI document says."""

import os
import re
from pathlib import Path

import schemathesis

# The table of docs/error-codes.md, the answers that users can read about.
DOCUMENTED = {
    (int(status), code)
    for status, code in re.findall(
        r"^\| (\d{3}) \| `(\w+)` \|", Path(os.environ["KEYWARD_ERROR_CODES"]).read_text("utf-8"), re.M
    )
}
assert len(DOCUMENTED) > 10, "docs/error-codes.md has no table of codes"


@schemathesis.check
def documented_error(ctx, response, case):
    """The document says "default: an error"; which ones there are, the page of error codes does."""
    if response.status_code < 400:
        return
    if case.method == "HEAD":
        return
    error = response.json()["error"]
    if (response.status_code, error["code"]) not in DOCUMENTED:
        raise AssertionError(f"{response.status_code} with the code {error['code']} is not documented")


@schemathesis.check
def request_has_an_id(ctx, response, case):
    """By which the server's log and audit know it."""
    if not response.headers.get("x-request-id"):
        raise AssertionError("there is no X-Request-Id")
