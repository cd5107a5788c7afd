#!/usr/bin/env bash
# Versions:  model-signing 1.1.1, sigstore 4.5.1
# Guess:     after `pip install model-signing`, `import model_signing` works: the package lists what it imports.
# Behaviour: it imports OpenSSL, and neither it nor any of its requirements brings pyOpenSSL.
# Seen:      import after a plain install: ModuleNotFoundError: No module named 'OpenSSL'; with pyOpenSSL: imported
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" model-signing==1.1.1 sigstore==4.5.1
cd "$folder"
imported() { { venv/bin/python -c "import model_signing.signing; print('imported')" 2>&1 || true; } | tail -1; }
plain=$(imported)
"${pip[@]}" pyOpenSSL==26.4.0
with=$(imported)
echo "import after a plain install: $plain; with pyOpenSSL: $with"
[ "$plain" = "ModuleNotFoundError: No module named 'OpenSSL'" ] && [ "$with" = imported ]
