# TAB for llmops in bash. In ~/.bashrc:  source <(llmops completion bash)
_llmops() {
    local -a answer
    COMPREPLY=()
    # bash splits words at = and : before anyone is asked; the line as it was typed says what was meant.
    mapfile -t answer < <(command "${COMP_WORDS[0]}" __complete bash "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" \
        2>/dev/null </dev/null)
    case ${answer[0]} in
        words) COMPREPLY=("${answer[@]:1}") ;;
        files) compopt +o nospace -o default ;;
        dirs) compopt +o nospace -o dirnames -o plusdirs ;;
    esac
}
complete -o nospace -F _llmops llmops
