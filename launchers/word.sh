# shellcheck shell=bash
# What job.sh and node.sh share, which source it.

# Print key $1 with text $2 as a word of the command line, in quotes where YAML might read the text otherwise.
word() {
    local text=$2
    if ! [[ $text =~ ^[A-Za-z0-9_./+-]*/[A-Za-z0-9_./+-]*$ ]]; then
        text=${text//\\/\\\\}
        text=\"${text//\"/\\\"}\"
    fi
    printf '%s=%s' "$1" "$text"
}
