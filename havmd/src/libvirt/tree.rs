//! A small XML tree for libvirt's domain definitions: read, change, write in libvirt's own layout.
//!
//! Names keep their prefix (`qemu:commandline`); namespaces are not resolved, because libvirt
//! itself always writes the same ones. Comments are dropped. Size and depth are bounded, since a
//! definition also comes from the peer.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// The longest definition that is read.
pub const MAX_XML_BYTES: usize = 1024 * 1024;
const MAX_DEPTH: usize = 40;

/// Why a text is not a definition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Not well-formed.
    #[error("not well-formed XML at byte {at}: {why}")]
    Malformed {
        /// Where.
        at: u64,
        /// What.
        why: String,
    },
    /// Over [`MAX_XML_BYTES`] or nested too deep.
    #[error("XML is too large ({0})")]
    TooLarge(&'static str),
}

/// An element.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Element {
    /// Its name with prefix.
    pub name: String,
    /// Attributes in their order.
    pub attrs: Vec<(String, String)>,
    /// Elements inside.
    pub children: Vec<Element>,
    /// The text inside, trimmed. libvirt has no mixed content.
    pub text: String,
}

impl Element {
    /// An empty element.
    pub fn new(name: &str) -> Self {
        Element {
            name: name.to_owned(),
            ..Element::default()
        }
    }
    /// With an attribute.
    #[must_use]
    pub fn with(mut self, attr: &str, value: &str) -> Self {
        self.set(attr, value);
        self
    }
    /// With a child.
    #[must_use]
    pub fn child(mut self, c: Element) -> Self {
        self.children.push(c);
        self
    }
    /// With text.
    #[must_use]
    pub fn text(mut self, t: &str) -> Self {
        self.text = t.to_owned();
        self
    }
    /// The value of an attribute.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attrs
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    }
    /// Sets an attribute.
    pub fn set(&mut self, name: &str, value: &str) {
        match self.attrs.iter_mut().find(|(n, _)| n == name) {
            Some((_, v)) => *v = value.to_owned(),
            None => self.attrs.push((name.to_owned(), value.to_owned())),
        }
    }
    /// Removes an attribute.
    pub fn unset(&mut self, name: &str) {
        self.attrs.retain(|(n, _)| n != name);
    }
    /// The first child of that name.
    pub fn get(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|c| c.name == name)
    }
    /// All children of that name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> + 'a {
        self.children.iter().filter(move |c| c.name == name)
    }
    /// The element at a path of child names.
    pub fn at(&self, path: &[&str]) -> Option<&Element> {
        path.iter().try_fold(self, |e, n| e.get(n))
    }
    /// The first child of that name, made where there is none.
    pub fn ensure(&mut self, name: &str) -> &mut Element {
        let i = match self.children.iter().position(|c| c.name == name) {
            Some(i) => i,
            None => {
                self.children.push(Element::new(name));
                self.children.len() - 1
            }
        };
        &mut self.children[i]
    }
    /// Replaces all children of that name by one, at the place of the first.
    pub fn replace(&mut self, new: Element) {
        match self.children.iter().position(|c| c.name == new.name) {
            Some(i) => {
                let name = new.name.clone();
                let mut seen = 0;
                self.children[i] = new;
                self.children.retain(|c| {
                    seen += usize::from(c.name == name);
                    c.name != name || seen == 1
                });
            }
            None => self.children.push(new),
        }
    }
    /// Removes all children of that name.
    pub fn remove(&mut self, name: &str) {
        self.children.retain(|c| c.name != name);
    }

    /// Reads a document.
    pub fn parse(xml: &str) -> Result<Element, TreeError> {
        if xml.len() > MAX_XML_BYTES {
            return Err(TreeError::TooLarge("over 1 MiB"));
        }
        let mut reader = Reader::from_str(xml);
        let mut stack: Vec<Element> = Vec::new();
        loop {
            let at = reader.buffer_position();
            let bad = |why: String| TreeError::Malformed { at, why };
            match reader.read_event().map_err(|e| bad(e.to_string()))? {
                Event::Start(s) => {
                    if stack.len() >= MAX_DEPTH {
                        return Err(TreeError::TooLarge("nested over 40 levels"));
                    }
                    stack.push(open(&s).map_err(bad)?);
                }
                Event::Empty(s) => {
                    let e = open(&s).map_err(bad)?;
                    match stack.last_mut() {
                        Some(parent) => parent.children.push(e),
                        None => return Ok(e),
                    }
                }
                Event::End(_) => {
                    let Some(mut e) = stack.pop() else {
                        return Err(bad("an end without a start".into()));
                    };
                    e.text = e.text.trim().to_owned();
                    match stack.last_mut() {
                        Some(parent) => parent.children.push(e),
                        None => return Ok(e),
                    }
                }
                Event::Text(t) => {
                    let t = t.decode().map_err(|e| bad(e.to_string()))?;
                    if let Some(e) = stack.last_mut() {
                        e.text.push_str(&t);
                    }
                }
                Event::CData(t) => {
                    let t = t.decode().map_err(|e| bad(e.to_string()))?;
                    if let Some(e) = stack.last_mut() {
                        e.text.push_str(&t);
                    }
                }
                Event::GeneralRef(r) => {
                    let name = r.decode().map_err(|e| bad(e.to_string()))?;
                    let text = match r.resolve_char_ref().map_err(|e| bad(e.to_string()))? {
                        Some(c) => c.to_string(),
                        None => quick_xml::escape::resolve_predefined_entity(&name)
                            .ok_or_else(|| bad(format!("unknown entity &{name};")))?
                            .to_owned(),
                    };
                    if let Some(e) = stack.last_mut() {
                        e.text.push_str(&text);
                    }
                }
                Event::Eof => return Err(bad("it ends before its last element does".into())),
                Event::Decl(_) | Event::Comment(_) | Event::PI(_) | Event::DocType(_) => {}
            }
        }
    }

    /// Writes it as libvirt does: two blanks a level, single quotes.
    pub fn to_xml(&self) -> String {
        let mut out = String::new();
        self.write(0, &mut out);
        out
    }

    fn write(&self, level: usize, out: &mut String) {
        let pad = "  ".repeat(level);
        out.push_str(&pad);
        out.push('<');
        out.push_str(&self.name);
        for (n, v) in &self.attrs {
            out.push_str(&format!(" {n}='{}'", escape(v, true)));
        }
        if self.children.is_empty() && self.text.is_empty() {
            out.push_str("/>\n");
        } else if self.children.is_empty() {
            out.push_str(&format!(">{}</{}>\n", escape(&self.text, false), self.name));
        } else {
            out.push_str(">\n");
            for c in &self.children {
                c.write(level + 1, out);
            }
            out.push_str(&format!("{pad}</{}>\n", self.name));
        }
    }
}

fn open(s: &BytesStart<'_>) -> Result<Element, String> {
    let name = String::from_utf8(s.name().as_ref().to_vec()).map_err(|e| e.to_string())?;
    let mut e = Element::new(&name);
    for a in s.attributes() {
        let a = a.map_err(|e| e.to_string())?;
        let key = String::from_utf8(a.key.as_ref().to_vec()).map_err(|e| e.to_string())?;
        let value = a.unescape_value().map_err(|e| e.to_string())?;
        e.attrs.push((key, value.into_owned()));
    }
    Ok(e)
}

fn escape(s: &str, attr: bool) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' if attr => out.push_str("&apos;"),
            '\n' if attr => out.push_str("&#10;"),
            c => out.push(c),
        }
    }
    out
}

/// A unified diff of two definitions, with three lines around each change.
pub fn unified_diff(old: &str, new: &str, old_name: &str, new_name: &str) -> String {
    similar::TextDiff::from_lines(old, new)
        .unified_diff()
        .context_radius(3)
        .header(old_name, new_name)
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was read is written back unchanged, entities included: `unprotect` depends on it.
    #[test]
    fn what_is_read_is_written_back() {
        let xml = "<domain type='qemu' xmlns:qemu='http://x'>\n  <name>a&amp;b</name>\n  \
                   <title>it&apos;s &lt;1&gt; &#65;</title>\n  <qemu:commandline>\n    \
                   <qemu:arg value='a=&apos;b&apos;,&quot;c'/>\n  </qemu:commandline>\n</domain>\n";
        let e = Element::parse(xml).unwrap();
        assert_eq!(e.get("name").unwrap().text, "a&b");
        assert_eq!(e.get("title").unwrap().text, "it's <1> A");
        let again = Element::parse(&e.to_xml()).unwrap();
        assert_eq!(e, again);
    }

    /// A hostile or broken text is an error with a place, never a panic or an endless stack.
    #[test]
    fn broken_text_is_an_error() {
        for bad in [
            "",
            "<a>",
            "<a></b>",
            "</a>",
            "<a b=c/>",
            "<a>&nope;</a>",
            "plain",
        ] {
            assert!(Element::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            Element::parse(&"<a>".repeat(100)),
            Err(TreeError::TooLarge("nested over 40 levels"))
        );
    }
}
