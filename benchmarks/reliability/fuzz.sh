#!/usr/bin/env bash
# The fuzzers, one after the other; each log ends with its exit status.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=.venv-fuzz/bin/python
out=runs/reliability
failed=0
note() {
    echo "exit $2" >> "$out/fuzz-$1.log"
    echo "$1: exit $2, $out/fuzz-$1.log"
    [ "$2" = 0 ] || failed=1
}

$python -m benchmarks.reliability.fuzz images -runs="${IMAGES:-1000000}" > $out/fuzz-images.log 2>&1
note images $?
$python -m benchmarks.reliability.fuzz bundle -runs="${BUNDLES:-20000}" > $out/fuzz-bundle.log 2>&1
note bundle $?

# A key that may do everything, so that no route hides behind a 401.
MMTL_KEYS=$out/fuzz-keys.json
rm -f $MMTL_KEYS
key=$(.venv-fuzz/bin/mmtl keys create fuzz --scope predict --scope metrics --scope admin --file $MMTL_KEYS)
MMTL_PORT=8137 MMTL_KEYS=$MMTL_KEYS MMTL_LOG_LEVEL=ERROR .venv-fuzz/bin/mmtl serve 2> $out/fuzz-api-service.log &
service=$!
for _ in $(seq 100); do
    $python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8137/health/ready')" 2> /dev/null && break
    sleep 0.1
done
.venv-fuzz/bin/schemathesis run http://127.0.0.1:8137/openapi.json --header "Authorization: Bearer $key" \
    --checks not_a_server_error,content_type_conformance,response_schema_conformance,status_code_conformance \
    --max-examples "${REQUESTS:-300}" --seed 0 > $out/fuzz-api.log 2>&1
status=$?
kill $service && wait $service || status=1
grep -q Traceback $out/fuzz-api-service.log && status=1
note api $status
exit $failed
