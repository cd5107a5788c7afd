#!/usr/bin/env bash
# Versions:  model-signing 1.1.1, sigstore 4.5.1, cryptography 50.0.2, pyOpenSSL 26.4.0
# Guess:     a certificate without the extension keyUsage, such as `openssl req -x509` makes by default, may be used for
#            anything (RFC 5280, 4.2.1.3), so a signature by it verifies; or signing with it is refused.
# Behaviour: it signs without a word, and the library's own verifier then refuses every signature by it.
# Seen:      without keyUsage: signed, then ValueError: Signing certificate cannot be used for signing;
#            with digitalSignature: signed, then verified
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    model-signing==1.1.1 sigstore==4.5.1 cryptography==50.0.2 pyOpenSSL==26.4.0
cd "$folder"
mkdir model
echo weights > model/weights.bin
venv/bin/python - 2>/dev/null <<'PY'
import datetime
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from model_signing import signing, verifying

MODEL, KEY, CERTIFICATE, SIGNATURE = map(Path, ("model", "key.pem", "certificate.pem", "model.sig"))


def write_certificate(with_usage):
    """Write a key and a certificate that it signs itself, valid for a month."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "signer")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    if with_usage:
        usage = dict.fromkeys(
            "content_commitment key_encipherment data_encipherment key_agreement crl_sign encipher_only"
            " decipher_only".split(),
            False,
        )
        usage |= {"digital_signature": True, "key_cert_sign": True}
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    KEY.write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    certificate = builder.sign(key, hashes.SHA256())
    CERTIFICATE.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def sign():
    config = signing.Config().use_certificate_signer(
        private_key=KEY, signing_certificate=CERTIFICATE, certificate_chain=[CERTIFICATE]
    )
    config.sign(MODEL, SIGNATURE)
    return "signed"


def verify():
    verifying.Config().use_certificate_verifier(certificate_chain=[CERTIFICATE]).verify(MODEL, SIGNATURE)
    return "verified"


def tried(step):
    try:
        return step()
    except Exception as error:
        return "%s: %s" % (type(error).__name__, str(error).splitlines()[0])


seen = []
for with_usage in (False, True):
    write_certificate(with_usage)
    seen.append((tried(sign), tried(verify)))
print("without keyUsage: %s, then %s; with digitalSignature: %s, then %s" % (*seen[0], *seen[1]))
sys.exit(seen != [("signed", "ValueError: Signing certificate cannot be used for signing"), ("signed", "verified")])
PY
