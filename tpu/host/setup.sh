#!/usr/bin/env bash
# What a host needs before anything of ours can run on it; what is there already is kept.
#
#   setup.sh start ROOT CODE SHA256 ARGUMENTS...   gets gs://.../ROOT/code/CODE.tar.gz, then becomes its supervisor
#   setup.sh environment FOLDER                     makes FOLDER, a virtual environment of tpu/lock.txt
#
# The launcher copies this file to every host and runs the first by ssh; the supervisor runs the second.
set -euo pipefail

UV=0.13.9
HOME_OF_OURS=$HOME/spiral_jax

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

# again COMMAND...: until it succeeds, at most seven times, for about two minutes.
again() {
  local delay=1
  until "$@"; do
    delay=$((2 * delay))
    ((delay <= 64)) || fail "failed seven times: $*"
    echo "$1 failed; again in $delay s" >&2
    sleep "$delay"
  done
}

# download URL FILE [HEADER]. The header goes by a pipe: arguments can be read by everyone on the machine.
download() {
  curl --silent --show-error --fail --location --connect-timeout 20 --speed-limit 1024 --speed-time 60 \
    --header @- --output "$2" "$1" <<<"${3:-}"
}

# download_object gs://BUCKET/NAME FILE
download_object() {
  local path=${1#gs://} host=${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com} header=""
  local bucket=${path%%/*} name=${path#*/}
  if [[ -z ${STORAGE_EMULATOR_HOST:-} ]]; then
    local token_url="http://${GCE_METADATA_HOST:-metadata.google.internal}"
    token_url+=/computeMetadata/v1/instance/service-accounts/default/token
    header=$(curl --silent --show-error --fail --header "Metadata-Flavor: Google" "$token_url" |
      python3 -c 'import json, sys; print("Authorization: Bearer", json.load(sys.stdin)["access_token"])') || return 1
  fi
  download "$host/storage/v1/b/$bucket/o/${name//\//%2F}?alt=media" "$2" "$header"
}

start() {
  local root=$1 code=$2 sha256=$3 folder=$HOME_OF_OURS/code/$2 new
  shift 3
  if [[ ! -d $folder ]]; then
    mkdir -p "$HOME_OF_OURS/code"
    new=$(mktemp -d "$HOME_OF_OURS/code/new.XXXXXX")
    again download_object "$root/code/$code.tar.gz" "$new/tarball"
    sha256sum --check --status - <<<"$sha256  $new/tarball" || fail "$code.tar.gz has another hash than $sha256"
    mkdir "$new/tree"
    tar -xzf "$new/tarball" -C "$new/tree"
    mv -T "$new/tree" "$folder" || [[ -d $folder ]] # whole, or not at all; another ssh may have been faster
    rm -r "$new"
  fi
  cd "$folder"
  exec python3 -m tpu.host.supervisor "--root=$root" "$@"
}

get_uv() {
  download "https://astral.sh/uv/$UV/install.sh" "$HOME_OF_OURS/install_uv.sh" &&
    UV_INSTALL_DIR=$HOME_OF_OURS/bin UV_NO_MODIFY_PATH=1 sh "$HOME_OF_OURS/install_uv.sh" --quiet
}

environment() {
  local folder=$1
  export PATH=$HOME_OF_OURS/bin:$PATH UV_HTTP_TIMEOUT=120
  [[ ! -e $folder/whole ]] || return 0
  mkdir -p "$HOME_OF_OURS/bin"
  command -v uv >/dev/null || again get_uv
  again uv venv --quiet --clear --python 3.11 "$folder"
  again uv pip install --quiet --python "$folder/bin/python" --requirement tpu/lock.txt
  touch "$folder/whole"
}

command=$1
shift
case $command in
  start | environment) "$command" "$@" ;;
  *) fail "unknown: $command" ;;
esac
