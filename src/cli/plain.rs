//! Texts that others wrote, in one line of plain output.

use std::borrow::Cow;

/// Control characters and line ends as they are written in source code: `\\n`, `\\t`, `\\u{1b}`. Everything else stays.
pub(super) fn plain(text: &str) -> Cow<'_, str> {
    let escapes = |char: char| char.is_control() || matches!(char, '\u{2028}' | '\u{2029}');
    if !text.contains(escapes) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for char in text.chars() {
        if escapes(char) { out.extend(char.escape_default()) } else { out.push(char) }
    }
    Cow::Owned(out)
}

/// Messages of libraries may have several lines.
pub(super) fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    plain(&lines.join(" ")).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_breaks_a_line_or_drives_a_terminal_is_left() {
        assert_eq!(plain("a\nb\tc\r\u{1b}[2J\u{85}\u{2028}\0"), "a\\nb\\tc\\r\\u{1b}[2J\\u{85}\\u{2028}\\u{0}");
        assert!(matches!(plain("é 漢 🎉 \\n  b"), Cow::Borrowed(_)));
        assert_eq!(one_line("it failed:\n\t here\n\n and there\u{7}  now"), "it failed: here and there\\u{7}  now");
    }
}
