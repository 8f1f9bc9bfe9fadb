package traffic

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
)

// Secrets are many secrets in little memory: ten million fit into 600 MB. Once filled, safe for
// concurrent use. Nothing prints them.
type Secrets struct {
	text []byte
	ends []int
}

// Add adds one.
func (s *Secrets) Add(secret string) {
	s.text = append(s.text, secret...)
	s.ends = append(s.ends, len(s.text))
}

// Len is how many there are.
func (s *Secrets) Len() int {
	if s == nil {
		return 0
	}
	return len(s.ends)
}

// at returns the secret of a number. It must not be changed.
func (s *Secrets) at(i int) []byte {
	from := 0
	if i > 0 {
		from = s.ends[i-1]
	}
	return s.text[from:s.ends[i]]
}

// lengths returns each length that there is.
func (s *Secrets) lengths() iter.Seq[int] {
	seen := map[int]bool{}
	from := 0
	for _, end := range s.ends {
		seen[end-from] = true
		from = end
	}
	return func(yield func(int) bool) {
		for n := range seen {
			if !yield(n) {
				return
			}
		}
	}
}

// Format keeps secrets out of everything that is printed.
func (s *Secrets) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "%d secrets", s.Len()) }

// longestSecret is more than any credential that a request header carries.
const longestSecret = 8 << 10 // bytes

// ReadSecrets reads one secret a line. Empty lines do not count. Its errors name lines, never what is in
// them.
func ReadSecrets(in io.Reader) (*Secrets, error) {
	s := &Secrets{}
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, longestSecret), longestSecret)
	n := 0
	for lines.Scan() {
		n++
		line := lines.Bytes()
		if len(line) == 0 {
			continue
		}
		if slices.ContainsFunc(line, func(c byte) bool { return c <= ' ' || c > '~' }) {
			return nil, fmt.Errorf("line %d is not one secret: it has a space or a byte that no key has", n)
		}
		s.text = append(s.text, line...)
		s.ends = append(s.ends, len(s.text))
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return nil, fmt.Errorf("line %d is too long for a secret", n+1)
	}
	if lines.Err() != nil {
		return nil, lines.Err()
	}
	if s.Len() == 0 {
		return nil, errors.New("there is no secret in it")
	}
	return s, nil
}
