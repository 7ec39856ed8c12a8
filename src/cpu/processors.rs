//! How many CPUs the calling thread may use: its affinity mask, and the limits of the process' control group.
//!
//! Like `std::thread::available_parallelism`, but without a single allocation: none can fail.

use super::MAX_THREADS;
use std::fs::File;
use std::io::Read;

/// Longest path that `File::open` takes without an allocation, and a little less.
const PATH: usize = 320;

/// CPUs in the calling thread's affinity mask.
pub fn in_mask() -> usize {
    // SAFETY: an all-zero cpu_set_t is an empty set; the kernel writes at most its size.
    let mask = unsafe {
        let mut mask: libc::cpu_set_t = std::mem::zeroed();
        let got = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut mask);
        if got == 0 { libc::CPU_COUNT(&mask) } else { 0 }
    };
    if mask > 0 {
        return mask as usize;
    }
    // More CPUs than the set has room for.
    // SAFETY: a plain question.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1).max(1)
}

/// `in_mask` CPUs, or fewer where the control group allows less time than that. Reads files.
pub fn within_limits(in_mask: usize) -> usize {
    let mut memberships = [0; 4096];
    let memberships = read("/proc/self/cgroup", &mut memberships).unwrap_or_default();
    let quota = quota("/sys/fs/cgroup", memberships).unwrap_or(in_mask);
    in_mask.min(quota).clamp(1, MAX_THREADS)
}

/// Whole CPUs of time that the groups in `memberships` (the text of /proc/self/cgroup) and those above them have, at
/// least one; `None` without a limit.
fn quota(root: &str, memberships: &str) -> Option<usize> {
    let limits = memberships.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (hierarchy, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
        if hierarchy == "0" && controllers.is_empty() {
            return least(group, |group| {
                let mut limit = [0; 64];
                let mut limit = read_in(&[root, group, "/cpu.max"], &mut limit)?.split_ascii_whitespace();
                ratio(limit.next()?, limit.next()?)
            });
        }
        let cpu = controllers.split(',').any(|controller| controller == "cpu");
        let folders = ["/cpu", "/cpu,cpuacct"].into_iter().filter(|_| cpu);
        let limits = folders.filter_map(|folder| {
            least(group, |group| {
                let (mut quota, mut period) = ([0; 64], [0; 64]);
                let quota = read_in(&[root, folder, group, "/cpu.cfs_quota_us"], &mut quota)?;
                ratio(quota, read_in(&[root, folder, group, "/cpu.cfs_period_us"], &mut period)?)
            })
        });
        limits.min()
    });
    limits.min().map(|least| least.max(1))
}

/// The least limit of a group and of those above it; in a container, only the topmost may be there to see.
fn least(group: &str, limit: impl Fn(&str) -> Option<usize>) -> Option<usize> {
    let group = group.trim_end_matches('/');
    let above = group.match_indices('/').map(|(at, _)| &group[..at]);
    above.chain([group]).filter_map(limit).min()
}

/// "max" and -1 are no limits, nor numbers here.
fn ratio(quota: &str, period: &str) -> Option<usize> {
    quota.trim().parse::<usize>().ok()?.checked_div(period.trim().parse().ok()?)
}

fn read_in<'a>(parts: &[&str], content: &'a mut [u8]) -> Option<&'a str> {
    let (mut path, mut length) = ([0; PATH], 0);
    for part in parts {
        path.get_mut(length..length + part.len())?.copy_from_slice(part.as_bytes());
        length += part.len();
    }
    read(std::str::from_utf8(&path[..length]).ok()?, content)
}

fn read<'a>(path: &str, content: &'a mut [u8]) -> Option<&'a str> {
    let mut file = File::open(path).ok()?;
    let mut length = 0;
    while length < content.len() {
        match file.read(&mut content[length..]).ok()? {
            0 => break,
            more => length += more,
        }
    }
    std::str::from_utf8(&content[..length]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A folder that looks like /sys/fs/cgroup.
    struct Groups(std::path::PathBuf);

    impl Groups {
        fn new(name: &str, files: &[(&str, &str)]) -> Groups {
            let root = std::env::temp_dir().join(format!("deltanet-groups-{name}-{}", std::process::id()));
            for (path, content) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().expect("inside the root")).expect("a folder");
                fs::write(path, content).expect("a file");
            }
            Groups(root)
        }

        fn quota(&self, memberships: &str) -> Option<usize> {
            quota(self.0.to_str().expect("a plain path"), memberships)
        }
    }

    impl Drop for Groups {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_least_limit_on_the_way_up_counts() {
        let files = [
            ("cpu.max", "max 100000\n"),
            ("a/cpu.max", "250000 100000\n"),
            ("a/b/cpu.max", "1600000 100000\n"),
            ("half/cpu.max", "50000 100000\n"),
        ];
        let groups = Groups::new("two", &files);
        assert_eq!(groups.quota("0::/\n"), None);
        assert_eq!(groups.quota("0::/a\n"), Some(2));
        assert_eq!(groups.quota("0::/a/b\n"), Some(2));
        assert_eq!(groups.quota("0::/half\n"), Some(1));
        assert_eq!(groups.quota("0::/not/to/be/seen\n"), None);
        assert_eq!(groups.quota(""), None);
        assert_eq!(groups.quota(&format!("0::/{}\n", "long/".repeat(200))), None);
    }

    #[test]
    fn older_groups_have_limits_too() {
        let files = [
            ("cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("cpu,cpuacct/box/cpu.cfs_quota_us", "300000\n"),
            ("cpu,cpuacct/box/cpu.cfs_period_us", "100000\n"),
        ];
        let groups = Groups::new("one", &files);
        assert_eq!(groups.quota("4:memory:/box\n3:cpu,cpuacct:/box\n"), Some(3));
        assert_eq!(groups.quota("4:memory:/box\n3:cpuset:/box\n"), None);
        assert_eq!(groups.quota("3:cpu,cpuacct:/\n"), None);
    }

    #[test]
    fn there_is_at_least_one_processor() {
        let mask = in_mask();
        assert!(mask >= 1 && (1..=mask).contains(&within_limits(mask)) && within_limits(usize::MAX) <= MAX_THREADS);
    }
}
