#!/usr/bin/env bash
# What a TPU host needs before it can train: the shared folder, Python 3.12 and the package.
#
#   bash launch/tpu_host.sh
#
# launch/tpu_pod.sh and launch/sky_learner.yaml run it on every host, in a copy of this repository;
# a second run changes nothing that is there already. It needs sudo without a password and a way to
# the internet, as Cloud TPU VMs have with an external address or behind Cloud NAT.
#
# NFS      a file share, such as 10.0.0.2:/shared, which is mounted; none unless set
# SHARED   the folder it is mounted at, /shared unless set
set -euo pipefail
cd "$(dirname "$0")/.."
shared="${SHARED:-/shared}"
if [ -n "${NFS:-}" ]; then
  command -v mount.nfs >/dev/null ||
    { sudo apt-get update --quiet && sudo apt-get install --yes --quiet nfs-common; }
  sudo mkdir -p "$shared"
  # In fstab, so that it is there again when the host restarts. A connection carries one stream.
  # nolock: NFSv3 keeps the locks of a host that was taken away, and no other could ever go on with
  # the run; a lock then holds among the processes of one host.
  grep --quiet " $shared nfs " /etc/fstab ||
    echo "$NFS $shared nfs defaults,_netdev,nolock,nconnect=7 0 0" | sudo tee -a /etc/fstab >/dev/null
  mountpoint --quiet "$shared" || sudo mount "$shared"
fi
# TPU images carry an older Python than the package asks for; uv brings its own.
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --editable ".[tpu]"
