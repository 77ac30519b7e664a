# TAB for llmops in fish. Once:  llmops completion fish > ~/.config/fish/completions/llmops.fish
function __llmops_complete
    set -l word (commandline -ct)
    set -l words (commandline -opc)
    set -l answer (command $words[1] __complete fish $words "$word" 2>/dev/null </dev/null)
    switch "$answer[1]"
        case files dirs
            set -l head (string match -r '^[^/]*=' -- $word)
            for path in (__fish_complete_path (string replace -r '^[^/]*=' '' -- $word))
                test "$answer[1]" = dirs; and not string match -qr '/(\t|$)' -- $path; and continue
                echo "$head$path"
            end
        case '*'
            set -q answer[2]; and printf '%s\n' $answer[2..-1]
    end
end
complete -c llmops -f -k -a '(__llmops_complete)'
