# shellcheck shell=bash
# What the scripts beside it have in common; it is sourced. None of it holds a secret: the
# instance's role says what it may do, and IMDSv2 which instance it is.

name=$(basename "$0")
say() { echo "$name: $*" >&2; }
die() {
  say "$*"
  exit 1
}
usage() {
  echo "usage: $1" >&2
  exit 2
}

# within SECONDS: from now on nothing here waits for longer than that.
within() {
  case $1 in
  '' | *[!0-9]* | 0*) die "a limit of '$1' seconds: want a whole number above 0" ;;
  esac
  deadline=$((SECONDS + $1))
}
# left is how many seconds there are, at least 1: timeout takes 0 for no limit.
left() { echo $((deadline > SECONDS ? deadline - SECONDS : 1)); }
over() { [ "$SECONDS" -ge "$deadline" ]; }

metadata=http://169.254.169.254/latest
# self sets what this instance is: instance, interface (that of its first address) and region.
self() {
  local token mac
  if ! {
    token=$(curl -sf --max-time 3 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/api/token") &&
      instance=$(read_metadata "$token" instance-id) &&
      region=$(read_metadata "$token" placement/region) &&
      mac=$(read_metadata "$token" mac) &&
      interface=$(read_metadata "$token" "network/interfaces/macs/$mac/interface-id")
  }; then
    die "the instance's metadata service does not say which instance this is (IMDSv2)"
  fi
  case $instance/$region/$interface in
  i-*/*-*/eni-*) ;;
  *) die "the metadata service says instance '$instance', region '$region', interface '$interface': not what they look like" ;;
  esac
}
read_metadata() { curl -sf --max-time 3 -H "X-aws-ec2-metadata-token: $1" "$metadata/meta-data/$2"; }

# ec2 OPERATION ...: one call, which may take 15 seconds and no longer than there are.
ec2() {
  local limit
  limit=$(left)
  AWS_MAX_ATTEMPTS=1 AWS_PAGER='' timeout --kill-after=2 "$((limit < 15 ? limit : 15))" \
    aws --region "$region" --output text --cli-connect-timeout 5 --cli-read-timeout 10 ec2 "$@"
}
