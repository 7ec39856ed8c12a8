//! Links between the project's Markdown files: the file is there, and so is the heading.

use crate::command::output;
use anyhow::{Result, bail};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Checks every Markdown file that git has under `root`. Addresses elsewhere are not fetched.
pub fn check(root: &Path) -> Result<()> {
    let listing = output(Command::new("git").arg("-C").arg(root).args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.md",
    ]))?;
    let mut broken = Vec::new();
    let mut links = 0;
    for name in listing.split_terminator('\0').filter(|name| root.join(name).exists()) {
        let text = fs::read_to_string(root.join(name))?;
        let page = Page::parse(&text);
        links += page.links.len();
        for link in &page.links {
            if let Err(reason) = resolve(root, Path::new(name), &page, link) {
                broken.push(format!("{name}: {link}: {reason}"));
            }
        }
    }
    if !broken.is_empty() {
        bail!("broken links:\n{}", broken.join("\n"));
    }
    println!("   {links} links in Markdown files lead somewhere");
    Ok(())
}

/// What a Markdown file links to and can be linked at.
struct Page {
    links: Vec<String>,
    anchors: HashSet<String>,
}

impl Page {
    fn parse(text: &str) -> Page {
        let mut page = Page { links: Vec::new(), anchors: HashSet::new() };
        let mut heading: Option<String> = None;
        for event in Parser::new_ext(text, Options::ENABLE_TABLES | Options::ENABLE_FOOTNOTES) {
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let anchor = slug(&heading.take().unwrap_or_default());
                    let nth = |n: usize| if n == 0 { anchor.clone() } else { format!("{anchor}-{n}") };
                    let free = (0..).map(nth).find(|anchor| !page.anchors.contains(anchor));
                    page.anchors.extend(free);
                }
                Event::Text(words) | Event::Code(words) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&words);
                    }
                }
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor that code hosts give a heading: lower case, words joined by hyphens, no punctuation.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn resolve(root: &Path, from: &Path, page: &Page, link: &str) -> std::result::Result<(), String> {
    if ["http://", "https://", "mailto:"].iter().any(|scheme| link.starts_with(scheme)) {
        return Ok(());
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    if path.starts_with('/') {
        return Err("the path must be relative".to_owned());
    }
    let target = if path.is_empty() { from.to_owned() } else { normal(&from.with_file_name("").join(path))? };
    let full = root.join(&target);
    if !full.exists() {
        return Err(format!("there is no {}", target.display()));
    }
    let Some(anchor) = anchor else { return Ok(()) };
    let known = if path.is_empty() {
        page.anchors.contains(anchor)
    } else {
        let text = fs::read_to_string(&full).map_err(|error| error.to_string())?;
        Page::parse(&text).anchors.contains(anchor)
    };
    if known { Ok(()) } else { Err(format!("{} has no heading #{anchor}", target.display())) }
}

/// The path without `.` and `..`; it may not leave the tree.
fn normal(path: &Path) -> std::result::Result<PathBuf, String> {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir if !parts.pop() => return Err("it leads out of the tree".to_owned()),
            std::path::Component::ParentDir => {}
            part => parts.push(part),
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_get_the_usual_anchors() {
        assert_eq!(slug("What is exact, and what is not"), "what-is-exact-and-what-is-not");
        assert_eq!(slug(" `struct_size` & SONAME"), "struct_size--soname");
        let page = Page::parse("# One\n## One\n## With [a link](x.md)\n");
        assert!(["one", "one-1", "with-a-link"].iter().all(|anchor| page.anchors.contains(*anchor)));
        assert_eq!(page.links, ["x.md"]);
    }

    #[test]
    fn broken_links_are_found() {
        let root = std::env::temp_dir().join(format!("deltanet-links-{}", std::process::id()));
        fs::create_dir_all(root.join("docs")).expect("a temporary folder");
        fs::write(root.join("docs/there.md"), "# Here\n").expect("a temporary file");
        fs::write(root.join("docs/page.md"), "# Top\n").expect("a temporary file");
        let page = Page::parse("# Top\n");
        let at = |link: &str| resolve(&root, Path::new("docs/page.md"), &page, link);
        for good in ["there.md", "./there.md#here", "../docs/there.md", "#top", "https://example.com/x", "../docs"] {
            assert_eq!(at(good), Ok(()), "{good}");
        }
        for bad in ["missing.md", "there.md#away", "#away", "/docs/there.md", "../../out.md"] {
            assert!(at(bad).is_err(), "{bad}");
        }
        fs::remove_dir_all(&root).expect("the folder was ours");
    }
}
