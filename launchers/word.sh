# shellcheck shell=bash
# A function for job.sh and node.sh, which source this file.

# Print an override of key $1 with text $2, as one argument. The text is quoted unless it is a plain path, because YAML would read some
# texts as numbers, comments or null.
override() {
    local text=$2
    if ! [[ $text =~ ^[A-Za-z0-9_./+-]*/[A-Za-z0-9_./+-]*$ ]]; then
        text=${text//\\/\\\\}
        text=\"${text//\"/\\\"}\"
    fi
    printf '%s=%s' "$1" "$text"
}
