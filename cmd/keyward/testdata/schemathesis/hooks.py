"""What every answer of the Management API has to be, besides what its OpenAPI document says."""

import json
import os
import re
import zlib
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


EXAMPLES = json.loads(os.environ["KEYWARD_EXAMPLES"])
KNOWN = json.loads(os.environ["KEYWARD_KNOWN"])


@schemathesis.hook
def before_add_examples(context, examples):
    """Asks each operation first in the one way that the test says, so that none depends on luck and time."""
    example = EXAMPLES.get(context.operation.definition.raw["operationId"])
    if example is None:  # it has succeeded
        return
    body = {"body": example["body"], "media_type": "application/json"} if "body" in example else {}
    examples.append(context.operation.Case(path_parameters=example.get("path"), query=example.get("query"), **body))


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    """Puts ids of what is there in the place of most random ones. What is deleted as a whole is left alone."""
    if not path_parameters or context.operation.definition.raw["operationId"] == "deleteInstance":
        return path_parameters
    for name, value in path_parameters.items():
        known = KNOWN.get(name)
        at = zlib.crc32(repr(value).encode())
        if known and at % 4:
            path_parameters[name] = known[at // 4 % len(known)]
    return path_parameters


@schemathesis.hook
def after_call(context, case, response):
    """Notes what was asked, for the test to see that nothing was left out."""
    with open(os.environ["KEYWARD_CALLED"], "a", encoding="utf-8") as called:
        called.write(f"{case.operation.definition.raw['operationId']} {response.status_code}\n")
