"""The certificates and tokens of one test cluster, made by openssl, and the kubeconfig files that use them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from testcluster.processes import run

ADMIN_TOKEN: Final = "cluster-admin-token"  # of a server on loopback that lives for one test run

EC: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_certificates(folder: Path, addresses: Sequence[str]) -> None:
    """A CA, and from it the API server's, the kubelet's and the API server's own client certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = ("-keyout", f"{folder}/ca.key", "-out", f"{folder}/ca.crt")
    run("openssl", "req", "-x509", *EC, "-days", "30", "-subj", "/CN=mailsluice-test-ca", *authority)
    names = [f"IP:{address}" for address in addresses]
    names += ["DNS:localhost", "DNS:kubernetes.default", "DNS:kubernetes.default.svc", "DNS:node-1"]
    extensions = folder / "extensions.cnf"
    extensions.write_text(f"subjectAltName={','.join(names)}\nextendedKeyUsage=serverAuth,clientAuth\n")
    subjects = {
        "apiserver": "/CN=kube-apiserver",
        "apiserver-kubelet-client": "/O=system:masters/CN=kube-apiserver-kubelet-client",
        "kubelet": "/O=system:nodes/CN=system:node:node-1",
    }
    for name, subject in subjects.items():
        path = f"{folder}/{name}"
        run("openssl", "req", *EC, "-subj", subject, "-keyout", f"{path}.key", "-out", f"{path}.csr")
        signer = ("-CA", f"{folder}/ca.crt", "-CAkey", f"{folder}/ca.key", "-CAcreateserial", "-days", "30")
        run(
            "openssl", "x509", "-req", "-in", f"{path}.csr", *signer, "-extfile", str(extensions), "-out", f"{path}.crt"
        )
    run("openssl", "genrsa", "-out", f"{folder}/service-accounts.key", "2048")
    run("openssl", "rsa", "-in", f"{folder}/service-accounts.key", "-pubout", "-out", f"{folder}/service-accounts.pub")
    (folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n')


def write_kubeconfig(path: Path, server: str, authority: Path) -> None:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "mailsluice-test",
        "clusters": [
            {
                "name": "mailsluice-test",
                "cluster": {
                    "server": server,
                    "certificate-authority-data": base64.b64encode(authority.read_bytes()).decode(),
                },
            }
        ],
        "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
        "contexts": [{"name": "mailsluice-test", "context": {"cluster": "mailsluice-test", "user": "admin"}}],
    }
    path.write_text(json.dumps(document))
