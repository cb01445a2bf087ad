//! The lines that the guest writes to its serial console.

/// Result of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The step passed.
    Ok,
    /// The step failed; the text says how.
    Failed(String),
    /// The step could not be run; the text says why.
    Skipped(String),
}

/// A line of the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A step begins.
    Step(&'a str),
    /// A step ended.
    Test(&'a str, Verdict),
    /// The host is asked to do something.
    Host(&'a str),
    /// A kernel message fails the run.
    Kernel(&'a str),
    /// The exit code of all steps.
    Exit(i32),
    /// The line is for the log only.
    Text,
}

/// Parses a line. One that is not part of the protocol is [`Line::Text`].
pub fn parse(line: &str) -> Line<'_> {
    // The kernel may have written unfinished text of its own before it.
    let Some(at) = line.find("RIG-") else {
        return Line::Text;
    };
    let (word, rest) = line[at..].split_once(' ').unwrap_or((&line[at..], ""));
    let rest = rest.trim();
    match word {
        "RIG-STEP" => Line::Step(rest),
        "RIG-HOST" => Line::Host(rest),
        "RIG-KERNEL" => Line::Kernel(rest),
        "RIG-EXIT" => rest.parse().map_or(Line::Text, Line::Exit),
        "RIG-TEST" => test(rest).unwrap_or(Line::Text),
        _ => Line::Text,
    }
}

fn test(rest: &str) -> Option<Line<'_>> {
    let (word, rest) = rest.split_once(' ')?;
    let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
    let verdict = match word {
        "ok" => Verdict::Ok,
        "fail" => Verdict::Failed(why.to_owned()),
        "skip" => Verdict::Skipped(why.to_owned()),
        _ => return None,
    };
    Some(Line::Test(name, verdict))
}

/// Whether a line of QEMU's error output reports a DMA transfer that the IOMMU refused. QEMU's NVMe
/// controller completes such a command with success, so nothing else would show it.
pub fn is_dma_fault(stderr_line: &str) -> bool {
    let told_by_iommu = ["vtd_", "amdvi_"].iter().any(|p| stderr_line.contains(p));
    // This message is not a DMA fault: the guest read the queue of the IOMMU while it was being
    // disabled.
    told_by_iommu && !stderr_line.contains("_init")
}

#[cfg(test)]
mod tests {
    use super::{Line, Verdict, is_dma_fault, parse};

    #[test]
    fn protocol() {
        assert_eq!(parse("RIG-EXIT 3"), Line::Exit(3));
        assert_eq!(parse("[    1.0] noiseRIG-EXIT 0"), Line::Exit(0));
        assert_eq!(parse("RIG-EXIT x"), Line::Text);
        assert_eq!(parse("RIG-STEP a b"), Line::Step("a b"));
        assert_eq!(parse("RIG-TEST ok io"), Line::Test("io", Verdict::Ok));
        assert_eq!(
            parse("RIG-TEST fail io: exit code 1"),
            Line::Test("io", Verdict::Failed("exit code 1".into()))
        );
        assert_eq!(
            parse("RIG-TEST skip cmb: none here"),
            Line::Test("cmb", Verdict::Skipped("none here".into()))
        );
        assert_eq!(parse("RIG-HOST device_del n1"), Line::Host("device_del n1"));
        assert_eq!(parse("hello"), Line::Text);
    }

    #[test]
    fn faults() {
        assert!(is_dma_fault(
            "qemu-system-x86_64: vtd_iommu_translate: detected translation failure"
        ));
        assert!(!is_dma_fault("qemu-system-x86_64: warning: something else"));
    }
}
