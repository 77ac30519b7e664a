#compdef llmops
# TAB for llmops in zsh. In ~/.zshrc, after compinit:  source <(llmops completion zsh)
_llmops() {
    local -a answer values shown open open_shown
    local line value text
    answer=("${(@f)$(command "${(Q)words[1]}" __complete zsh "${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null </dev/null)}")
    case $answer[1] in
        files) [[ $PREFIX == [^/]##=* ]] && compset -P '*='; _files; return ;;
        dirs) [[ $PREFIX == --*=* ]] && compset -P '*='; _files -/; return ;;
    esac
    for line in "${(@)answer[2,-1]}"; do
        [[ -n $line ]] || continue
        value=${line%%$'\t'*}
        text=$value
        [[ $line == *$'\t'* ]] && text="$value  -- ${line#*$'\t'}"
        if [[ $value == *[=./@,] ]]; then
            open+=("$value"); open_shown+=("${text[1,COLUMNS-1]}")
        else
            values+=("$value"); shown+=("${text[1,COLUMNS-1]}")
        fi
    done
    (( $#values )) && compadd -l -V llmops -d shown -a values
    (( $#open )) && compadd -S '' -l -V llmops-open -d open_shown -a open
    return 0
}
if [[ $funcstack[1] == _llmops ]]; then
    _llmops "$@"
else
    compdef _llmops llmops
fi
