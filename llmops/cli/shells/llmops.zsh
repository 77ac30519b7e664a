#compdef llmops
# TAB for llmops in zsh. In ~/.zshrc, after compinit:  source <(llmops completion zsh)
_llmops() {
    local -a answer lines values shown open open_shown
    local line value text
    integer width=0
    answer=("${(@f)$(command "${(Q)words[1]}" __complete zsh "${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null </dev/null)}")
    case $answer[1] in
        files) [[ $PREFIX == [^/]##=* ]] && compset -P '*='; _files; return ;;
        dirs) [[ $PREFIX == --*=* ]] && compset -P '*='; _files -/; return ;;
    esac
    lines=("${(@)answer[2,-1]}")
    for line in $lines; do
        value=${line%%$'\t'*}
        (( $#value > width && $#value < 40 )) && width=$#value
    done
    for line in $lines; do
        value=${line%%$'\t'*}
        text=$value
        (( $#value < width )) && text=${(r:width:)value}
        [[ $line == *$'\t'* ]] && text="$text  -- ${line#*$'\t'}"
        if [[ $value == *[=./@,] ]]; then
            open+=("$value"); open_shown+=("${text[1,COLUMNS-1]}")
        else
            values+=("$value"); shown+=("${text[1,COLUMNS-1]}")
        fi
    done
    (( $#values )) && compadd -l -V llmops -d shown -a values
    (( $#open )) && compadd -S '' -l -V llmops-open -d open_shown -a open
    (( $#values + $#open ))
}
if [[ $funcstack[1] == _llmops ]]; then
    _llmops "$@"
else
    compdef _llmops llmops
fi
