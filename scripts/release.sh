#!/usr/bin/env bash
# scripts/release.sh VERSION [--tag]: checks version and changelog, builds wheel and sdist, tries the
# wheel outside the checkout, and with --tag makes the tag. It pushes and uploads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:-}
tag=${2:-}
python=${PYTHON:-.venv/bin/python}
die() { echo "release: $*" >&2; exit 1; }

[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+(rc[0-9]+)?$ ]] || die "VERSION must look like 0.1.0, got '$version'"
[[ -z $tag || $tag == --tag ]] || die "unknown option '$tag'; known: --tag"
command -v "$python" >/dev/null || die "$python is not there; run make first, or set PYTHON"

found=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
[[ $found == "$version" ]] || die "pyproject.toml has version $found, not $version"
grep -qE "^## \[?$version\b" CHANGELOG.md || die "CHANGELOG.md has no section '## $version'"
if git rev-parse -q --verify "refs/tags/v$version" >/dev/null; then die "the tag v$version exists"; fi
if [[ $tag == --tag && -n $(git status --porcelain) ]]; then
  die "the tree has changes that are not committed"
fi

rm -rf dist
"$python" -m build --no-isolation --outdir dist
wheel=$(echo dist/mmjax-"$version"-py3-none-any.whl)
[[ -f $wheel && -f dist/mmjax-$version.tar.gz ]] || die "dist/ lacks the wheel or the sdist of $version"

# Away from the checkout, with the packages of this environment but not the checkout itself.
interpreter=$(command -v "$python")
[[ $interpreter == /* ]] || interpreter=$PWD/$interpreter
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
"$python" -m pip install --quiet --no-deps --no-input --target "$outside/site" "$wheel"
"$python" - "$outside/site" <<'EOF'
import pathlib
import sys

found = {p.name for p in pathlib.Path(sys.argv[1]).iterdir()} - {"bin"}
wanted = {"mmjax", "kernels_pallas"}
assert {n for n in found if not n.endswith(".dist-info")} == wanted, found
EOF
(cd "$outside" && PYTHONPATH=$outside/site JAX_PLATFORMS=cpu "$interpreter" -P - "$version" <<'EOF'
import importlib.metadata
import sys

import jax.numpy as jnp
from flax import nnx

import mmjax

assert "site/mmjax" in mmjax.__file__, mmjax.__file__
assert importlib.metadata.version("mmjax") == sys.argv[1]
cfg = mmjax.ModelConfig.tiny(num_layers=2, layer_types=("lightning", "softmax"))
out = mmjax.Decoder(cfg, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]], jnp.int32))
assert out.logits.shape == (1, 3, cfg.vocab_size)
EOF
) || die "the wheel does not work outside the checkout"

echo "release: dist/ holds mmjax $version; the wheel works outside the checkout"
if [[ $tag == --tag ]]; then
  git tag -a "v$version" -m "mmjax $version"
  echo "release: tagged v$version; push it with: git push origin v$version"
else
  echo "release: dry run; --tag (make release VERSION=$version TAG=1) tags it"
fi
