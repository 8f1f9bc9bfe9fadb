package portal

import (
	"errors"
	"maps"
	"slices"
	"strconv"

	"keyward/authz/apikey"
)

// A field is one of a form, as the template "field" shows it.
type field struct {
	Name, Label, Help string
	Kind              string // text, number, date, choice, switch or lines
	Value             string // of a switch: not empty if it is on
	Empty             string // what holds where nothing is entered
	Fault             string
	Choices           []choice
	Required          bool
	Max               int // characters; 0: 256
}

// ID is what a label and what describes the field go by.
func (f field) ID() string { return "f-" + f.Name }

// Length is the most characters that a browser takes.
func (f field) Length() int {
	if f.Max == 0 {
		return 256
	}
	return f.Max
}

// DescribedBy lists the ids of what explains the field; "" if nothing does.
func (f field) DescribedBy() string {
	by := ""
	if f.Fault != "" {
		by = f.ID() + "-fault"
	}
	if f.Help != "" || f.Empty != "" {
		if by != "" {
			by += " "
		}
		by += f.ID() + "-help"
	}
	return by
}

// fieldList puts faults where they belong, and keeps those that belong to no field of the form.
type fieldList []field

// A fault is something that is wrong with a form, for the list above it.
type fault struct {
	ID, Label string // of the field; "": it belongs to none
	Text      string
}

// blame shows each fault at its field, which is named by its path below under. It returns all of them, those of
// fields first, in the form's order.
func (l fieldList) blame(faults map[string]string, under string) []fault {
	at := make(map[string]*field, len(l))
	for i := range l {
		at[under+l[i].Name] = &l[i]
	}
	var left []fault
	for _, name := range slices.Sorted(maps.Keys(faults)) {
		if f := at[name]; f != nil {
			f.Fault = upper(faults[name]) + "."
		} else {
			left = append(left, fault{Text: (&apikey.InvalidError{Field: name, Reason: faults[name]}).Error()})
		}
	}
	return append(l.faults(), left...)
}

// faults are what is wrong with fields of the list.
func (l fieldList) faults() []fault {
	var all []fault
	for _, f := range l {
		if f.Fault != "" {
			all = append(all, fault{f.ID(), f.Label, f.Fault})
		}
	}
	return all
}

// faultList collects errors.
type faultList []error

func (l *faultList) add(err error) {
	if err != nil {
		*l = append(*l, err)
	}
}

func (l faultList) err() error { return errors.Join(l...) }

// Read says a field's value as people read it.
func (f field) Read() string {
	switch {
	case f.Kind == "switch" && f.Value != "":
		return "yes"
	case f.Kind == "switch":
		return "no"
	case f.Value == "":
		return "none"
	}
	for _, c := range f.Choices {
		if c.Value == f.Value {
			return c.Text
		}
	}
	return f.Value
}

// hidden returns what a form sent in the given fields, to be sent once more.
func hidden(v *visit, fields fieldList) []choice {
	var sent []choice
	for _, f := range fields {
		if value := v.PostForm.Get(f.Name); value != "" {
			sent = append(sent, choice{f.Name, value})
		}
	}
	return sent
}

// revisionOf returns what the form's page was made of.
func revisionOf(v *visit) (apikey.Revision, error) {
	n, err := strconv.ParseUint(v.PostForm.Get("revision"), 10, 64)
	if err != nil || n == 0 { // 0 would mean whatever it is now
		return 0, errForm
	}
	return apikey.Revision(n), nil
}

// statusOf is the status of a page that shows an error at its form.
func statusOf(err error) int { return failureOf(err).Status }
