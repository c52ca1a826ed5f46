# shellcheck shell=bash
# Secrets come in by the environment alone. Their values are struck out of all that is logged.

# Fills SECRET_VALUES from the environment variables whose names look secret.
find_secrets() {
  local name value
  SECRET_VALUES=()
  while IFS= read -r name; do
    case $name in
    *_PATH | *_FILE) continue ;;
    TOKEN | *_TOKEN | *_TOKEN_* | *SECRET* | *PASSWORD* | *CREDENTIAL* | *API_KEY* | *APIKEY* | KEY | *_KEY | *_KEY_*)
      value=${!name}
      # Short values are switches, not secrets; striking them out would maim every line.
      ((${#value} >= 8)) && SECRET_VALUES+=("$value")
      ;;
    esac
  done < <(compgen -e)
}

# Copies standard input to a file, or to standard output, line by line, without the secrets.
# It reads on when the disk is full: the program that writes must neither block nor break.
log_pump() {
  local line secret target=${1:-/dev/stdout}
  trap '' TERM INT USR1 USR2 HUP
  find_secrets
  exec 8>>"$target" || exec 8>/dev/null
  while IFS= read -r line || [[ -n $line ]]; do
    for secret in ${SECRET_VALUES[@]+"${SECRET_VALUES[@]}"}; do
      line=${line//"$secret"/***}
    done
    printf '%s\n' "$line" 2>/dev/null >&8 || true
  done
}
