//! Errors that show the place, the text and the remedy.
//!
//! ```text
//! error: unknown key `beet_ms`
//!   --> havm.toml:14:1
//!    |
//! 14 | beet_ms = 10
//!    | ^^^^^^^
//!    = help: did you mean `beat_ms`?
//! ```

use std::fmt;
use std::ops::Range;
use std::path::Path;

/// The longest piece of a line that is shown, characters.
const SHOWN_CHARS: usize = 160;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// The file.
    pub file: String,
    /// Line, from 1; 0 where the file could not be read.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: String,
    /// The line's text.
    text: String,
    /// How many characters the caret underlines.
    width: usize,
}

impl Diagnostic {
    pub(crate) fn new(
        file: &str,
        source: &str,
        span: Range<usize>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        let mut start = span.start.min(source.len());
        while !source.is_char_boundary(start) {
            start -= 1;
        }
        let line_start = source[..start].rfind('\n').map_or(0, |i| i + 1);
        let text = source[line_start..].lines().next().unwrap_or("");
        let column = source[line_start..start].chars().count() + 1;
        let in_line = span.end.clamp(start, (line_start + text.len()).max(start));
        let width = source
            .get(start..in_line)
            .map_or(1, |s| s.chars().count())
            .max(1);
        Diagnostic {
            file: file.to_owned(),
            line: source[..start].matches('\n').count() + 1,
            column,
            message: message.into(),
            help: help.into(),
            text: text.chars().take(SHOWN_CHARS).collect(),
            width: width.min(SHOWN_CHARS.saturating_sub(column - 1).max(1)),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let printable = |s: &str| -> String {
            s.chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect()
        };
        writeln!(f, "error: {}", printable(&self.message))?;
        if self.line == 0 {
            writeln!(f, "  --> {}", self.file)?;
        } else {
            let number = self.line.to_string();
            let pad = " ".repeat(number.len());
            writeln!(f, "{pad}--> {}:{}:{}", self.file, self.line, self.column)?;
            writeln!(f, "{pad} |")?;
            writeln!(f, "{number} | {}", printable(&self.text).trim_end())?;
            writeln!(
                f,
                "{pad} | {}{}",
                " ".repeat(self.column.min(SHOWN_CHARS) - 1),
                "^".repeat(self.width)
            )?;
        }
        write!(f, "   = help: {}", printable(&self.help))
    }
}

/// Everything that is wrong with a config, in the order of the file. Displayed in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub diagnostics: Vec<Diagnostic>,
}

impl ConfigError {
    pub(crate) fn unreadable(path: &Path, why: String, help: &str) -> Self {
        ConfigError::from(Diagnostic {
            file: path.display().to_string(),
            line: 0,
            column: 0,
            message: format!("cannot read the config: {why}"),
            help: help.to_owned(),
            text: String::new(),
            width: 0,
        })
    }
}

impl From<Diagnostic> for ConfigError {
    fn from(d: Diagnostic) -> Self {
        ConfigError {
            diagnostics: vec![d],
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, d) in self.diagnostics.iter().enumerate() {
            if i > 0 {
                write!(f, "\n\n")?;
            }
            write!(f, "{d}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
