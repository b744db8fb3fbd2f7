//! A hook's output, made fit for a log: bounded, and without control characters.

/// Keeps the first bytes of what a hook writes, and counts the rest.
pub(crate) struct Capture {
    kept: Vec<u8>,
    limit: usize,
    beyond: u64,
}

impl Capture {
    pub fn new(limit: usize) -> Self {
        Capture {
            kept: Vec::new(),
            limit,
            beyond: 0,
        }
    }

    pub fn add(&mut self, data: &[u8]) {
        let room = self.limit.saturating_sub(self.kept.len()).min(data.len());
        self.kept.extend_from_slice(&data[..room]);
        self.beyond += (data.len() - room) as u64;
    }

    /// As text: what is no UTF-8 replaced, control characters but newline and tab escaped.
    pub fn text(&self) -> String {
        let mut out = String::with_capacity(self.kept.len());
        for c in String::from_utf8_lossy(&self.kept).trim_end().chars() {
            if c.is_control() && c != '\n' && c != '\t' {
                out.extend(c.escape_default());
            } else {
                out.push(c);
            }
        }
        if self.beyond > 0 {
            out.push_str(&format!("… ({} bytes more)", self.beyond));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_becomes_bounded_plain_text() {
        let mut c = Capture::new(10);
        c.add(b"ab\x1b[31m\xff");
        c.add(b"0123456789");
        assert_eq!(c.text(), "ab\\u{1b}[31m\u{fffd}01… (8 bytes more)");
    }
}
